#pragma once

#include "nvlink/group.h"
#include "nvlink/phase.h"

namespace moe_ep::nvlink {

// Waits until every rank has come to the call behind it, on one multiprocessor instead of all that the call
// takes: for calls beside computation, to which ranks come at different times. Ranks whose call has no such
// wait tell that they are there all the same. `phase`: of the call, for what is reported if a rank does not
// come.
Status launch_meet(const Group& group, Phase phase, cudaStream_t stream);

}  // namespace moe_ep::nvlink
