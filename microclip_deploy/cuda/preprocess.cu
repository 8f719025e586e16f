// The test view of a batch of photos: Pillow's antialiased bicubic resize and the centre crop.
//
// Two launches on one stream, as Pillow makes two passes with a rounded 8-bit image between them:
//
//     first_pass    photos, each (ROWS, COLUMNS, CHANNELS) -> lines, resized along one axis
//     second_pass   lines -> views (B, SIDE, SIDE, CHANNELS), resized along the other axis
//
// Which axis comes first changes the rounding, so each photo says it. One thread makes one output
// byte and meets no other, blockIdx.y is the photo. All arithmetic is on integers: the result is
// the same on every device, and equal to Pillow's byte for byte. The host (cuda/preprocess.py)
// makes the weights and uploads only the pixels that the crop needs.
//
// photos: int64 (B, FIELDS), one row a photo, columns FIELD_*:
//     PIXELS           address of its uploaded pixels
//     ROWS, COLUMNS    their number
//     LINES            where its lines begin in `lines`
//     ACROSS, DOWN     where its weight tables along a row and along a column begin in `tables`
//     DOWN_FIRST       1: the first pass goes along columns; 0: along rows
// tables: int32, each (ROW_WEIGHTS + taps, SIDE), one column an output position, rows:
//     ROW_FIRST        the first source pixel, counted from the first uploaded one
//     ROW_COUNT        the number of source pixels
//     ROW_WEIGHTS ...  their weights in units of 2^-PRECISION_BITS
// A column, not a row, is a position: neighbouring threads then read neighbouring weights.

#if !defined(SIDE) || !defined(CHANNELS) || !defined(PRECISION_BITS) || !defined(VALUE_MAX)
#error "define SIDE, CHANNELS, PRECISION_BITS and VALUE_MAX; cuda/preprocess.py does"
#endif
#if !defined(FIELDS) || !defined(FIELD_PIXELS) || !defined(FIELD_ROWS) ||         \
    !defined(FIELD_COLUMNS) || !defined(FIELD_LINES) || !defined(FIELD_ACROSS) || \
    !defined(FIELD_DOWN) || !defined(FIELD_DOWN_FIRST)
#error "define FIELDS and every FIELD_*; cuda/preprocess.py does"
#endif
#if !defined(ROW_FIRST) || !defined(ROW_COUNT) || !defined(ROW_WEIGHTS)
#error "define every ROW_*; cuda/preprocess.py does"
#endif

// Returns the weighted sum of source pixels `step` bytes apart, rounded to a byte.
// table: the column of the output position. pixels: the first uploaded source pixel.
static __device__ unsigned char weighted(const unsigned char* pixels, long long step,
                                         const int* table) {
  const int count = table[ROW_COUNT * SIDE];
  const int* weights = table + ROW_WEIGHTS * SIDE;
  pixels += table[ROW_FIRST * SIDE] * step;
  // Starting at one half makes the shift round to nearest. The sum cannot overflow: Pillow leaves
  // two bits for sums of bicubic weights below 0 and above 1.
  int sum = 1 << (PRECISION_BITS - 1);
  for (int tap = 0; tap < count; ++tap) {
    sum += pixels[tap * step] * weights[tap * SIDE];
  }
  // An arithmetic shift, so that negative sums round down as Pillow's do before they are clipped.
  const int value = sum >> PRECISION_BITS;
  return (unsigned char)(value < 0 ? 0 : value > VALUE_MAX ? VALUE_MAX : value);
}

// Returns one byte of the `columns` pixels wide `source` resized along one axis.
static __device__ unsigned char resized(const unsigned char* source, long long columns, bool down,
                                        const int* tables, const long long* photo, unsigned int row,
                                        unsigned int column, unsigned int channel) {
  if (down) {
    return weighted(source + column * CHANNELS + channel, columns * CHANNELS,
                    tables + photo[FIELD_DOWN] + row);
  }
  return weighted(source + row * columns * CHANNELS + channel, CHANNELS,
                  tables + photo[FIELD_ACROSS] + column);
}

extern "C" __global__ void first_pass(const long long* photos, const int* tables,
                                      unsigned char* lines) {
  const long long* photo = photos + (long long)blockIdx.y * FIELDS;
  const bool down = photo[FIELD_DOWN_FIRST];
  const unsigned int rows = down ? SIDE : (unsigned int)photo[FIELD_ROWS];
  const unsigned int columns = down ? (unsigned int)photo[FIELD_COLUMNS] : SIDE;
  // 32 bits suffice: the axis not yet resized has about as many pixels as the photo's short side.
  const unsigned int element = blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= rows * columns * CHANNELS) {
    return;  // The grid fits the photo with the most lines.
  }
  const unsigned int pixel = element / CHANNELS;
  lines[photo[FIELD_LINES] + element] =
      resized((const unsigned char*)photo[FIELD_PIXELS], photo[FIELD_COLUMNS], down, tables, photo,
              pixel / columns, pixel % columns, element % CHANNELS);
}

extern "C" __global__ void second_pass(const long long* photos, const int* tables,
                                       const unsigned char* lines, unsigned char* views) {
  const long long* photo = photos + (long long)blockIdx.y * FIELDS;
  const bool down = !photo[FIELD_DOWN_FIRST];
  const unsigned int element = blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= SIDE * SIDE * CHANNELS) {
    return;
  }
  const unsigned int pixel = element / CHANNELS;
  views[(long long)blockIdx.y * SIDE * SIDE * CHANNELS + element] =
      resized(lines + photo[FIELD_LINES], down ? SIDE : photo[FIELD_COLUMNS], down, tables, photo,
              pixel / SIDE, pixel % SIDE, element % CHANNELS);
}
