// Codes of a bit stream to one a byte with BMI2, where no vector instruction does better: 64 codes, 8 a 64-bit word.

template <int BITS>
inline void deposit(const uint8_t* stream, uint8_t* codes) {
  constexpr uint64_t MASK = 0x0101010101010101 * ((uint64_t(1) << BITS) - 1);
  for (int o = 0; o < 8; o++, stream += BITS, codes += 8) {
    uint64_t word = 0;
    __builtin_memcpy(&word, stream, BITS);  // of a length that is known: else a call for every 8 codes
    word = _pdep_u64(word, MASK);
    __builtin_memcpy(codes, &word, 8);
  }
}
