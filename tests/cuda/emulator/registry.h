// Kernels by name, for the emulated driver.
#pragma once

#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emulator {

// Takes the parameters over, given by address as to cuLaunchKernel; what comes back runs the kernel for the current thread.
using Kernel = std::function<std::function<void()>(void**)>;

struct Registration {
    Registration(const char* name, Kernel kernel);
};

template <class... Parameters, size_t... I>
Kernel with_parameters(void (*kernel)(Parameters...), std::index_sequence<I...>) {
    using Values = std::tuple<std::remove_cvref_t<Parameters>...>;
    return [kernel](void** at) -> std::function<void()> {
        const auto values = std::make_shared<Values>(*static_cast<std::remove_cvref_t<Parameters>*>(at[I])...);
        return [kernel, values] { std::apply(kernel, *values); };
    };
}
template <class... Parameters>
Kernel with_parameters(void (*kernel)(Parameters...)) {
    return with_parameters(kernel, std::index_sequence_for<Parameters...>());
}

}  // namespace emulator

#define REGISTER(NAME) static const emulator::Registration NAME##_registration(#NAME, emulator::with_parameters(NAME));
