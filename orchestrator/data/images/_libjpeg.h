/* What _jpeg.c uses of libjpeg-turbo's binary interface, version 6.2.
 *
 * The layout is that of jpeglib.h (libjpeg-turbo 2.1 to 3.2, JPEG_LIB_VERSION 62), which has not
 * changed since 1998; jpeg_CreateDecompress compares version and size with its own and refuses
 * anything else. Declared here so that a build needs a C compiler and nothing more; the library
 * itself is the one that Pillow's wheel brings, found at run time and updated with Pillow.
 *
 * Copyright (C) 1991-1998, Thomas G. Lane; 2009-2026, D. R. Commander and others. This software is
 * based in part on the work of the Independent JPEG Group.
 */
#ifndef ORCHESTRATOR_LIBJPEG_H
#define ORCHESTRATOR_LIBJPEG_H

#include <stddef.h>

#define LIBJPEG_VERSION 62
#define MESSAGE_LENGTH 200

enum { COLOURS_RGB = 2, COLOURS_CMYK = 4 };
enum { DCT_ACCURATE = 0 };
enum { HEADER_OK = 1 };

struct decompress;

struct error_handler {
  void (*error_exit)(struct decompress *);
  void (*emit_message)(struct decompress *, int level);
  void (*output_message)(struct decompress *);
  void (*format_message)(struct decompress *, char *buffer);
  void (*reset_error_mgr)(struct decompress *);
  int msg_code;
  union {
    int i[8];
    char s[80];
  } msg_parm;
  int trace_level;
  long num_warnings;
  const char *const *message_table;
  int last_message;
  const char *const *addon_table;
  int first_addon, last_addon;
};

struct progress {
  void (*progress_monitor)(struct decompress *);
  long pass_counter, pass_limit;
  int completed_passes, total_passes;
};

struct source {
  const unsigned char *next_input_byte;
  size_t bytes_in_buffer;
  void *methods[5];
};

struct decompress {
  struct error_handler *err;
  void *mem;
  struct progress *progress;
  void *client_data;
  int is_decompressor, global_state;
  struct source *src;
  unsigned int image_width, image_height;
  int num_components, jpeg_color_space;
  int out_color_space;
  unsigned int scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out;
  int dct_method, do_fancy_upsampling, do_block_smoothing;
  int quantize_colors, dither_mode, two_pass_quantize, desired_number_of_colors;
  int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
  unsigned int output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height;
  int actual_number_of_colors;
  void *colormap;
  unsigned int output_scanline;
  int input_scan_number;
  unsigned int input_iMCU_row;
  int output_scan_number;
  unsigned int output_iMCU_row;
  void *coef_bits;
  void *quant_tables[4], *dc_tables[4], *ac_tables[4];
  int data_precision;
  void *comp_info;
  int progressive_mode, arith_code;
  unsigned char arith_dc_L[16], arith_dc_U[16], arith_ac_K[16];
  unsigned int restart_interval;
  int saw_JFIF_marker;
  unsigned char JFIF_major_version, JFIF_minor_version, density_unit;
  unsigned short X_density, Y_density;
  int saw_Adobe_marker;
  unsigned char Adobe_transform;
  int CCIR601_sampling;
  void *marker_list;
  int max_h_samp_factor, max_v_samp_factor, min_DCT_scaled_size;
  unsigned int total_iMCU_rows;
  void *sample_range_limit;
  int comps_in_scan;
  void *cur_comp_info[4];
  unsigned int MCUs_per_row, MCU_rows_in_scan;
  int blocks_in_MCU, MCU_membership[10];
  int Ss, Se, Ah, Al;
  int unread_marker;
  void *modules[11];
};

struct libjpeg {
  struct error_handler *(*std_error)(struct error_handler *);
  void (*CreateDecompress)(struct decompress *, int version, size_t size);
  void (*mem_src)(struct decompress *, const unsigned char *, unsigned long);
  int (*read_header)(struct decompress *, int require_image);
  int (*start_decompress)(struct decompress *);
  void (*crop_scanline)(struct decompress *, unsigned int *left, unsigned int *width);
  unsigned int (*skip_scanlines)(struct decompress *, unsigned int);
  unsigned int (*read_scanlines)(struct decompress *, unsigned char **, unsigned int);
  void (*destroy_decompress)(struct decompress *);
};

#endif
