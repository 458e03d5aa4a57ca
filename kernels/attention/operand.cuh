// Operands of warpgroup products in shared memory.
#pragma once

#include <ptx/hopper.cuh>

// Descriptor of an operand in shared memory with 128-byte swizzle: rows of 64 bf16, eight rows to a 1024-byte atom; atoms along the rows are 1024 bytes
// apart, atoms along the columns `column_step` bytes (only used by transposed operands).
DEVICE uint64_t operand(const void* at, uint32_t column_step) {
    constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62;
    return SWIZZLE_128 | uint64_t(1024 >> 4) << 32 | uint64_t(column_step >> 4) << 16 | (shared_address(at) & 0x3ffff) >> 4;
}
