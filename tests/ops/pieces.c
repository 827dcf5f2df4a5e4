// Stands before torch's parallel_for, for the operators on the CPU: sixteen threads are promised,
// one runs all pieces, the last one first, and every loop is noted.
#include <stdint.h>

typedef void (*Body)(int64_t, int64_t, void *);

static int64_t noted[4096][2];
static int count, reversed, inside;

void begin(int in_reverse) { count = 0, reversed = in_reverse; }
int loops(void) { return count; }
int64_t pieces(int loop) { return noted[loop][0]; }
int64_t grain(int loop) { return noted[loop][1]; }

int32_t torch_get_num_threads(uint32_t *threads) {
  *threads = 16;
  return 0;
}

int32_t torch_parallel_for(int64_t first, int64_t last, int64_t least, Body body, void *context) {
  if (first >= last) return 0;
  if (inside || !reversed) {
    body(first, last, context);
    return 0;
  }
  if (count < 4096) noted[count][0] = last - first, noted[count++][1] = least;
  inside = 1;
  while (last-- > first) body(last, last + 1, context);
  inside = 0;
  return 0;
}
