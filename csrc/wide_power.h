// Included inside a namespace by wide_*.h.

// exp(y - whole log 2), which is near 1, for a whole number near y / log 2.
PALEY_INLINE F power_within(F whole, F y) {
  F r = fused(whole, all(-0.693359375f), y);
  r = fused(whole, all(2.12194440e-4f), r);
  F p = all(1.9875691500e-4f);
  p = fused(p, r, all(1.3981999507e-3f));
  p = fused(p, r, all(8.3334519073e-3f));
  p = fused(p, r, all(4.1665795894e-2f));
  p = fused(p, r, all(1.6666665459e-1f));
  p = fused(p, r, all(5.0000001201e-1f));
  return fused(p, r * r, r) + all(1.0f);
}
