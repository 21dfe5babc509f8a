// What the loops ask of an instruction set. They are written once over V, a vector type that
// satisfies `Isa`; a compiler names the line that a type does not.
#pragma once
#include <concepts>
#include <cstdint>

#include "layout.h"

namespace {

// What most instruction sets have in common; a V that differs says so.
struct IsaDefaults {
  static constexpr int kFewPairRows = 0;   // rows of bfloat16 up to which `gemv_pairs` serves
  static constexpr bool kTiles = false;    // whether more rows are multiplied by V::Tiles<bfloat16
                                           // an activation>
  static constexpr bool kSplits = false;   // whether a row of 16 bits is multiplied in digits
  static constexpr bool kFlushes = false;  // whether products take subnormal numbers for 0
  static constexpr int kStreams = 1;       // panels that `gemv` reads at a time
  static constexpr int kFarAhead = 0;      // bytes ahead that codes are fetched to the second cache
};

// The sizes of V.
//   kRows       rows of a panel that a vector F of 32-bit lanes spans
//   kStep       columns that a lane of decoded weights takes part in: 1, or 2 as a pair
//   kVectors    vectors that hold kStep columns of kRows rows: a pair is two lanes, or one of
//   bfloat16 kSlots      32-bit words that hold the kStep activations of a row kHalfSteps  steps in
//   the 4 columns of half an oct (see layout.h) kFewRows    rows of activations up to which
//   `gemv_rows` serves kTilePanels, kBlockRows, kDepth: panels, rows and columns that `multiply`
//   takes at a time: sums
//               fit the registers, weights and activations the first cache
//   kOffset     what the table of `int_decode` adds to twice a code's value
template <class V>
concept IsaSizes = kPanelRows % V::kRows == 0 && V::kHalfSteps * V::kStep == 4 &&
                   (V::kVectors == V::kStep || V::kVectors == 1) && (V::kSlots == V::kVectors) &&
                   V::kFewRows > 1 && V::kTilePanels > 0 && V::kBlockRows > 0 &&
                   V::kDepth % 32 == 0 && std::same_as<decltype(V::kOffset), const int32_t>;

// Codes of 8 columns for `decode`, where these are not `load_codes`.
template <class V>
FP4_INLINE auto load_oct(const uint8_t* codes) {
  if constexpr (requires { V::load_oct(codes); }) {
    return V::load_oct(codes);
  } else {
    return V::load_codes(codes);
  }
}

template <class V>
concept IsaArithmetic = requires(typename V::F a, typename V::I i, float* y, const float* x) {
  { V::zero() } -> std::same_as<typename V::F>;
  { V::splat(1.f) } -> std::same_as<typename V::F>;
  { V::load(x) } -> std::same_as<typename V::F>;
  { V::store(y, a) } -> std::same_as<void>;
  { V::add(a, a) } -> std::same_as<typename V::F>;
  { V::mul(a, a) } -> std::same_as<typename V::F>;  // weights by scales, in V's own form
  { V::fma(a, a, a) } -> std::same_as<typename V::F>;
  { V::to_float(i) } -> std::same_as<typename V::F>;
};

// Weights and activations.
//   broadcast   the kStep activations of a step, to all lanes
//   decode      half an oct of kRows rows -> [kHalfSteps][kVectors]; decode_fp8: 4 columns of FP8
//               in the same lanes, over kE4M3Excess
//   scales      of kRows rows; expand: to kVectors vectors
//   finish      kVectors sums -> one float a row
//   swap_middle where kSlots is 2: decoded from columns (0, 2), (1, 3) to (0, 1), (2, 3)
//   reorder_row a row of activations into V's order of columns
template <class V>
concept IsaDecoding =
    requires(typename V::F (&d)[V::kHalfSteps][V::kVectors], typename V::F (&s)[V::kVectors],
             const typename V::F (&sums)[V::kVectors], const typename V::Tables& tables,
             const typename V::Fp8Tables& fp8, const uint8_t* bytes, uint8_t* out, const float* x,
             float* y) {
      { V::broadcast(x) } -> std::same_as<typename V::F>;
      V::decode(tables, load_oct<V>(bytes), 0, d);
      V::decode_fp8(fp8, bytes, d);
      { V::template scales<Nvfp4>(bytes) } -> std::same_as<typename V::F>;
      { V::template scales<Mxfp4>(bytes) } -> std::same_as<typename V::F>;
      V::expand(V::zero(), s);
      { V::finish(sums) } -> std::same_as<typename V::F>;
      V::reorder_row(x, int64_t{8}, y);
      V::from_float16(bytes, int64_t{1}, y);
      V::to_float16(x, int64_t{1}, out);
      requires V::kSlots == 1 || requires { V::swap_middle(d); };
    };

// Activations of 8 bits.
//   int_decode  half an oct -> twice the values plus kOffset, a byte each
//   dot         a group's values times activations, less an offset -> one int32 a row
//   next_digit  2^8 times a sum of `dot`, and another; split: activations into digits
template <class V>
concept IsaIntegers =
    requires(const typename V::I (&codes)[4], const typename V::IntTables& tables,
             const uint8_t* bytes, const int8_t* digits, int8_t* out, const float* x, int32_t sum) {
      { V::int_decode(tables, V::load_codes(bytes), 0) } -> std::same_as<typename V::I>;
      { V::dot(codes, digits, int32_t{0}) } -> std::same_as<typename V::I>;
      requires !V::kSplits || requires {
        { V::next_digit(codes[0], codes[0]) } -> std::same_as<typename V::I>;
        { V::split(x, 1.f, 1.f, out, 16, sum) } -> std::same_as<uint32_t>;
      };
    };

// What `panel.h` asks for. Pairs of bfloat16 are such vectors too, and tiles of them.
template <class V>
concept Vectors =
    std::derived_from<V, IsaDefaults> && IsaSizes<V> && IsaArithmetic<V> && IsaDecoding<V>;

// What a whole call asks for. Where kFewPairRows, V also has `Pairs`; where kTiles, `Tiles` and
// kTiledOutputs, the fewest outputs of float32 for them.
template <class V>
concept Isa = Vectors<V> && IsaIntegers<V>;

template <Vectors V, class Format>
using TablesOf = std::conditional_t<kIsFp8<Format>, typename V::Fp8Tables, typename V::Tables>;

template <Vectors V>
constexpr int kRowVectors = kPanelRows / V::kRows;

}  // namespace
