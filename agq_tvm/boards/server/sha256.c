/* SHA-256 (FIPS 180-4), so that a file that is kept is what its name says. */
#include "board.h"

#include <string.h>

static const uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotated(uint32_t value, int bits) { return value >> bits | value << (32 - bits); }

static void add_block(struct sha256 *hash, const unsigned char *block) {
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; ++i) {
    memcpy(&w[i], block + 4 * i, 4);
    w[i] = __builtin_bswap32(w[i]); /* every machine that this runs on is little-endian */
  }
  for (int i = 16; i < 64; ++i) {
    uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[i - 7] +
           (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
  }
  memcpy(s, hash->state, sizeof s);
  for (int i = 0; i < 64; ++i) {
    uint32_t e = s[4], a = s[0];
    uint32_t t = s[7] + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & s[5]) ^ (~e & s[6])) +
                 ROUND[i] + w[i];
    uint32_t u = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += t;
    s[0] = t + u;
  }
  for (int i = 0; i < 8; ++i) hash->state[i] += s[i];
}

void sha256_begin(struct sha256 *hash) {
  static const uint32_t FIRST[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(hash->state, FIRST, sizeof FIRST);
  hash->size = 0;
}

void sha256_add(struct sha256 *hash, const void *data, size_t size) {
  const unsigned char *next = data;
  size_t held = hash->size % 64;
  hash->size += size;
  while (size) {
    if (!held && size >= 64) {
      add_block(hash, next);
      next += 64, size -= 64;
      continue;
    }
    size_t taken = 64 - held < size ? 64 - held : size;
    memcpy(hash->block + held, next, taken);
    next += taken, size -= taken, held = (held + taken) % 64;
    if (!held) add_block(hash, hash->block);
  }
}

void sha256_end(struct sha256 *hash, char digits[65]) {
  static const char HEX[] = "0123456789abcdef";
  uint64_t bits = __builtin_bswap64(8 * hash->size);
  unsigned char end[72] = {0x80};
  size_t padding = 64 - (hash->size + 8) % 64; /* 1 to 64 bytes, then the length */
  memcpy(end + padding, &bits, 8);
  sha256_add(hash, end, padding + 8);
  for (int i = 0; i < 64; ++i) digits[i] = HEX[hash->state[i / 8] >> (28 - 4 * (i % 8)) & 15];
  digits[64] = 0;
}
