// In place of CUDA's header, for sources that want its numbers alone.
#pragma once

#include "numbers.h"

#ifndef __device__
#define __host__
#define __device__
#endif
