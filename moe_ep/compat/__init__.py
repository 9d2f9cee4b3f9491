"""Other libraries' interfaces, kept by moe_ep. Each is imported by those who want it, never by `import moe_ep`."""
