// Where one way to compute a product becomes faster than another, measured on AVX2 cores (Zen 3 to 5) with two threads.
#pragma once

namespace ferrum::cpu::tuning {

/// From this many columns on, 16 weight rows are unpacked into scratch, block by block, and reused over all columns;
/// below, 8 rows are unpacked in registers for up to 4 columns at a time.
inline constexpr int tile_columns_q2_k = 4;
inline constexpr int tile_columns_q3_k = 4;
inline constexpr int tile_columns_q4_k = 8;
inline constexpr int tile_columns_q5_k = 4;
inline constexpr int tile_columns_q6_k = 6;
inline constexpr int tile_columns_q8_0 = 8;
inline constexpr int tile_columns_iq4 = 4;
inline constexpr int tile_columns_blocks_32 = 3;  // Q4_0, Q4_1, Q5_0, Q5_1

/// Columns that share one unpacking: their activations (2 KB each at k = 2048) stay in the L2 cache over all rows of a call.
inline constexpr int tile_columns_max = 128;

/// How far the prefetch of weight rows runs ahead of the group of rows after the one being computed.
inline constexpr int prefetch_bytes = 8192;

/// From this many columns on, four rows and three columns of floats form one register tile.
inline constexpr int tile_columns_float = 4;

/// Columns of floats (8 KB each at k = 2048) that stay in the L2 cache over all rows of a call; a multiple of three.
inline constexpr int group_columns_float = 48;

}  // namespace ferrum::cpu::tuning
