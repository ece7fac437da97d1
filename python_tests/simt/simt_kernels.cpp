// Every compiled launch of the fused step, over simt.h.
#include "cuda_runtime.h"
//
#include "../../csrc/cuda/fused_step_bfloat16.cu"
#include "../../csrc/cuda/fused_step_bfloat16_state.cu"
#include "../../csrc/cuda/fused_step_float16.cu"
#include "../../csrc/cuda/fused_step_float32.cu"
#include "../../csrc/cuda/fused_step_float64.cu"
