// Kernels by name, for the emulated driver.
#pragma once

#include <functional>
#include <utility>

namespace emulator {

// Runs the kernel for the current thread, its parameters given by address as to cuLaunchKernel.
using Kernel = std::function<void(void**)>;

struct Registration {
    Registration(const char* name, Kernel kernel);
};

template <class... Parameters, size_t... I>
Kernel with_parameters(void (*kernel)(Parameters...), std::index_sequence<I...>) {
    return [kernel](void** at) { kernel(*static_cast<std::remove_cvref_t<Parameters>*>(at[I])...); };
}
template <class... Parameters>
Kernel with_parameters(void (*kernel)(Parameters...)) {
    return with_parameters(kernel, std::index_sequence_for<Parameters...>());
}

}  // namespace emulator

#define REGISTER(NAME) static const emulator::Registration NAME##_registration(#NAME, emulator::with_parameters(NAME));
