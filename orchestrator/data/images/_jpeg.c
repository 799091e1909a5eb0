/* Decodes a rectangle of a JPEG with libjpeg-turbo's crop and skip, to exactly the pixels that a
 * decode of the whole would give there.
 *
 * Blocks left, right and above are Huffman-decoded only, rows below not at all. Strict: the first
 * warning of the library is an error, and so is a file without an end-of-image marker.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "_libjpeg.h"

/* A legal file may repeat scans for ever; photographs have about ten. */
#define MAX_SCANS 100
/* Where chroma has two columns or fewer, libjpeg-turbo does not smooth it. */
#define MIN_COLUMNS 16
/* libjpeg-turbo returns at most max_v_samp_factor (4) rows a call. */
#define ROWS 4

static struct libjpeg lib;

struct decoder {
  struct decompress jpeg; /* first, so that libjpeg's pointer to it is one to this */
  struct error_handler errors;
  struct progress progress;
  jmp_buf failed;
  char message[MESSAGE_LENGTH];
};

struct region {
  unsigned int left, top, width, height;
  unsigned int eighths;
  int channels;
};

static void fail(struct decompress *jpeg) {
  struct decoder *self = (struct decoder *)jpeg;
  self->errors.format_message(jpeg, self->message);
  longjmp(self->failed, 1);
}

static void fail_with(struct decoder *self, const char *message) {
  strncpy(self->message, message, MESSAGE_LENGTH - 1);
  longjmp(self->failed, 1);
}

static void fail_on_warning(struct decompress *jpeg, int level) {
  if (level < 0) fail(jpeg);
}

static void stay_quiet(struct decompress *jpeg) { (void)jpeg; }

static void limit_scans(struct decompress *jpeg) {
  if (jpeg->input_scan_number > MAX_SCANS) fail_with((struct decoder *)jpeg, "too many scans");
}

/* Entropy-coded data never contains this marker, so a search behind the header is conclusive. */
static int has_end(const unsigned char *data, size_t size) {
  for (; size >= 2; size--)
    if (data[size - 2] == 0xff && data[size - 1] == 0xd9) return 1;
  return 0;
}

/* Narrow the decoded columns to the region; return how many of them lie left of it. */
static unsigned int crop(struct decompress *jpeg, const struct region *want) {
  /* Smooth chroma upsampling looks one column to each side; at a cut it would repeat the edge. */
  unsigned int left = want->left > 0 ? want->left - 1 : 0;
  unsigned int right = want->left + want->width;
  if (right < jpeg->output_width) right++;
  if (right - left < MIN_COLUMNS) {
    right = left + MIN_COLUMNS < jpeg->output_width ? left + MIN_COLUMNS : jpeg->output_width;
    if (right - left < MIN_COLUMNS) left = right > MIN_COLUMNS ? right - MIN_COLUMNS : 0;
  }
  if (left == 0 && right == jpeg->output_width) return want->left;
  unsigned int width = right - left;
  lib.crop_scanline(jpeg, &left, &width);
  return want->left - left;
}

static void read_region(struct decoder *self, const struct region *want, unsigned char *rows,
                        unsigned char *out) {
  struct decompress *jpeg = &self->jpeg;
  size_t stride = (size_t)jpeg->output_width * want->channels;
  size_t kept = (size_t)want->width * want->channels;
  size_t skipped = (size_t)crop(jpeg, want) * want->channels;
  unsigned char *pointers[ROWS];
  unsigned int bottom = want->top + want->height;
  for (int i = 0; i < ROWS; i++) pointers[i] = rows + i * stride;
  if (want->top > 0 && lib.skip_scanlines(jpeg, want->top) != want->top)
    fail_with(self, "rows are missing");
  while (jpeg->output_scanline < bottom) {
    unsigned int left = bottom - jpeg->output_scanline;
    unsigned int got = lib.read_scanlines(jpeg, pointers, left < ROWS ? left : ROWS);
    if (got == 0) fail_with(self, "rows are missing");
    for (unsigned int i = 0; i < got; i++, out += kept) memcpy(out, pointers[i] + skipped, kept);
  }
}

/* Return 0, or -1 with the reason in self->message. */
static int decode(struct decoder *self, const unsigned char *image, size_t size,
                  const struct region *want, unsigned char *out) {
  struct decompress *jpeg = &self->jpeg;
  unsigned char *volatile rows = NULL;
  jpeg->err = lib.std_error(&self->errors);
  self->errors.error_exit = fail;
  self->errors.emit_message = fail_on_warning;
  self->errors.output_message = stay_quiet;
  if (setjmp(self->failed)) {
    lib.destroy_decompress(jpeg);
    free(rows);
    return -1;
  }
  lib.CreateDecompress(jpeg, LIBJPEG_VERSION, sizeof *jpeg);
  self->progress.progress_monitor = limit_scans;
  jpeg->progress = &self->progress;
  lib.mem_src(jpeg, image, size);
  if (lib.read_header(jpeg, 1) != HEADER_OK) fail_with(self, "no image");
  if (!has_end(jpeg->src->next_input_byte, jpeg->src->bytes_in_buffer))
    fail_with(self, "Premature end of JPEG file");
  jpeg->out_color_space = want->channels == 4 ? COLOURS_CMYK : COLOURS_RGB;
  jpeg->dct_method = DCT_ACCURATE;
  jpeg->do_fancy_upsampling = 1;
  jpeg->scale_num = want->eighths;
  jpeg->scale_denom = 8;
  lib.start_decompress(jpeg);
  if (want->width > jpeg->output_width || want->left > jpeg->output_width - want->width ||
      want->height > jpeg->output_height || want->top > jpeg->output_height - want->height)
    fail_with(self, "the region is outside the image");
  rows = malloc((size_t)ROWS * jpeg->output_width * want->channels);
  if (rows == NULL) fail_with(self, "out of memory");
  read_region(self, want, rows, out);
  lib.destroy_decompress(jpeg);
  free(rows);
  return 0;
}

static int is_valid(const struct region *want, Py_ssize_t out_bytes) {
  const unsigned int most = 65535;
  return lib.read_header != NULL && want->width >= 1 && want->height >= 1 &&
         want->width <= most && want->height <= most && want->left <= most && want->top <= most &&
         want->eighths >= 1 && want->eighths <= 8 &&
         (want->channels == 3 || want->channels == 4) &&
         (size_t)want->width * want->height * want->channels == (size_t)out_bytes;
}

static PyObject *decode_region(PyObject *module, PyObject *args) {
  Py_buffer image, out;
  struct region want;
  (void)module;
  if (!PyArg_ParseTuple(args, "y*w*IIIIIi", &image, &out, &want.left, &want.top, &want.width,
                        &want.height, &want.eighths, &want.channels))
    return NULL;
  struct decoder *self = calloc(1, sizeof *self);
  int status = -1;
  if (self != NULL && is_valid(&want, out.len)) {
    Py_BEGIN_ALLOW_THREADS
    status = decode(self, image.buf, (size_t)image.len, &want, out.buf);
    Py_END_ALLOW_THREADS
    if (status != 0) PyErr_SetString(PyExc_ValueError, self->message);
  } else {
    PyErr_SetString(PyExc_RuntimeError, "decode_region: not bound, or arguments do not agree");
  }
  free(self);
  PyBuffer_Release(&image);
  PyBuffer_Release(&out);
  if (status != 0) return NULL;
  Py_RETURN_NONE;
}

static int find(void *library, const char *name, void *function) {
  void *found = dlsym(library, name);
  memcpy(function, &found, sizeof found);
  return found != NULL;
}

static PyObject *bind(PyObject *module, PyObject *args) {
  const char *path;
  (void)module;
  if (!PyArg_ParseTuple(args, "s", &path)) return NULL;
  void *so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (so == NULL) return PyErr_Format(PyExc_OSError, "%s", dlerror());
  struct libjpeg found;
  if (find(so, "jpeg_std_error", &found.std_error) &&
      find(so, "jpeg_CreateDecompress", &found.CreateDecompress) &&
      find(so, "jpeg_mem_src", &found.mem_src) &&
      find(so, "jpeg_read_header", &found.read_header) &&
      find(so, "jpeg_start_decompress", &found.start_decompress) &&
      find(so, "jpeg_crop_scanline", &found.crop_scanline) &&
      find(so, "jpeg_skip_scanlines", &found.skip_scanlines) &&
      find(so, "jpeg_read_scanlines", &found.read_scanlines) &&
      find(so, "jpeg_destroy_decompress", &found.destroy_decompress)) {
    lib = found;
    Py_RETURN_NONE;
  }
  return PyErr_Format(PyExc_OSError, "%s is not libjpeg-turbo", path);
}

static PyMethodDef methods[] = {
    {"bind", bind, METH_VARARGS, "bind(path): use this libjpeg-turbo (interface 6.2)."},
    {"decode_region", decode_region, METH_VARARGS,
     "decode_region(image, out, left, top, width, height, eighths, channels)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_jpeg", "A rectangle of a JPEG.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModule_Create(&definition); }
