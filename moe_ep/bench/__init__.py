"""moe-ep bench: how long dispatch and combine take, next to the bare collectives that move the same bytes."""
