// Included once per instruction set, with ALRO_ISA (a namespace) and ALRO_LANES (floats per vector) defined.
#pragma once

#include "attention.inl.h"
#include "kernels.h"
#include "layers.inl.h"
#include "listwise.inl.h"
#include "simd.h"
#include "vocab.inl.h"

namespace alro::ALRO_ISA {
static const Kernels table = {
    ALRO_NAME, kLanes,     kBlock, vocab_tile, vocab_tile_bf16, grad_tile,        grad_product,
    widen,     interleave, dot,    axpy,       listwise,        &attention_table, &layer_table,
};
}  // namespace alro::ALRO_ISA
