/// A step of the optimiser.
#pragma once

namespace faiss_saap {

/// One step of AdamW (arXiv 1711.05101): with the moments
///     first  <- beta1 first  + (1 - beta1) gradient
///     second <- beta2 second + (1 - beta2) gradient^2
/// parameters <- (1 - rate * decay) parameters - rate * correction1 * first /
///               (sqrt(correction2 * second) + epsilon).
struct AdamWParams {
    float rate = 0;   ///< learning rate
    float decay = 0;  ///< weight decay, multiplied by the rate
    float beta1 = .9f, beta2 = .99f, epsilon = 1e-8f;
    float correction1 = 1, correction2 = 1; ///< 1 / (1 - beta^step)
};

} // namespace faiss_saap
