// Included once per instruction set, with ALRO_ISA (a namespace) and ALRO_LANES (floats per vector) defined.
#pragma once

#include "attention/attention.inl.h"
#include "common/simd.h"
#include "instruction_sets/kernels.h"
#include "layers/layers.inl.h"
#include "listwise/listwise.inl.h"
#include "vocab/vocab.inl.h"

namespace alro::ALRO_ISA {
static const Kernels table = {
    ALRO_NAME, kLanes,     kBlock, vocab_tile, vocab_tile_bf16, grad_tile,        grad_product,
    widen,     interleave, dot,    axpy,       listwise,        &attention_table, &layer_table,
};
}  // namespace alro::ALRO_ISA
