#pragma once

#include "ggml_inside.h"

// Computes GGML_OP_FLASH_ATTN_EXT, or declines.
ggml::cpu::tensor_traits * appliance_attention();
