// The product of every kind of matrix: included inside a namespace after matmul_tiles.h and, if Lanes::WIDE is not 0,
// matmul_wide.h.

template <Kind KIND, bool FINE, bool AFFINE>
void product(const MatmulTask& task) {
  if (task.inputs.tokens == 1) return one_token<KIND, FINE, AFFINE>(task);
  typename Lanes::Tables tables(KIND, task.matrix.table);
  int64_t begin = 0;
  if constexpr (Lanes::WIDE && !FINE) {
    begin = task.inputs.tokens / Lanes::WIDE * Lanes::WIDE;
    if (begin) wide_tokens<AFFINE>(task, write_out<KIND, FINE>, tables, begin);
  }
  if (begin < task.inputs.tokens) many_tokens<FINE, AFFINE>(task, write_out<KIND, FINE>, tables, begin);
}

template <Kind KIND, bool FINE>
void product(const MatmulTask& task) {
  task.matrix.affine ? product<KIND, FINE, true>(task) : product<KIND, FINE, false>(task);
}

template <Kind KIND>
void product_of_both(const MatmulTask& task) {
  task.matrix.fine ? product<KIND, true, false>(task) : product<KIND, false, false>(task);
}

void matmul(const MatmulTask& task) {
  switch (task.matrix.kind) {
    case PALEY_TABLE2: return product<PALEY_TABLE2, false>(task);
    case PALEY_TABLE3: return product<PALEY_TABLE3, false>(task);
    case PALEY_TABLE4: return product<PALEY_TABLE4, false>(task);
    case PALEY_TABLE6: return product<PALEY_TABLE6, false, false>(task);
    case PALEY_OWN2: return product<PALEY_OWN2, false, false>(task);
    case PALEY_PAIRS4: return product<PALEY_PAIRS4, false, false>(task);
    case PALEY_PAIRS6: return product<PALEY_PAIRS6, false, false>(task);
    case PALEY_PAIRS8: return product<PALEY_PAIRS8, false, false>(task);
    case PALEY_LOOK8: return product_of_both<PALEY_LOOK8>(task);
    case PALEY_LOOK9: return product_of_both<PALEY_LOOK9>(task);
    case PALEY_LOOK10: return product_of_both<PALEY_LOOK10>(task);
    case PALEY_LOOK12: return product_of_both<PALEY_LOOK12>(task);
    case PALEY_WORDS: return product<PALEY_WORDS, true>(task);
    case PALEY_BYTES:
      return task.matrix.fine ? product<PALEY_BYTES, true>(task) : product<PALEY_BYTES, false, false>(task);
    case PALEY_TRELLIS1: return product<PALEY_TRELLIS1, false, false>(task);
    case PALEY_TRELLIS1_5: return product<PALEY_TRELLIS1_5, false, false>(task);
    case PALEY_TRELLIS2: return product<PALEY_TRELLIS2, false, false>(task);
    case PALEY_TRELLIS2_5: return product<PALEY_TRELLIS2_5, false, false>(task);
    case PALEY_TRELLIS3: return product<PALEY_TRELLIS3, false, false>(task);
    case PALEY_TRELLIS3_5: return product<PALEY_TRELLIS3_5, false, false>(task);
    case PALEY_TRELLIS4: return product<PALEY_TRELLIS4, false, false>(task);
    case PALEY_TRELLIS5: return product_of_both<PALEY_TRELLIS5>(task);
    case PALEY_TRELLIS6: return product_of_both<PALEY_TRELLIS6>(task);
    case PALEY_KINDS: break;
  }
}
