// Parameters of choose_tokens, passed by value; the wrapper in Rust has the same layout.
#pragma once

static constexpr int MAX_CHOICES = 64;

// How each row's token is chosen, see choose.cu.
struct Choices {
    float sharpness[MAX_CHOICES];
    float top_p[MAX_CHOICES];
    float draw[MAX_CHOICES];
};
