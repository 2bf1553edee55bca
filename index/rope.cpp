#include <faiss_saap/rope.h>

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "check.h"
#include "parse_number.h"
#include "shallow_json.h"

namespace faiss_saap {

namespace {

constexpr double kPi = 3.14159265358979323846;

double number(const nlohmann::json& j, const char* key, double otherwise) {
    const auto it = j.find(key);
    if (it == j.end() || it->is_null()) {
        return otherwise;
    }
    FAISS_THROW_IF_NOT_FMT(
            it->is_number(),
            "rope_scaling: %s is of type %s, not a number",
            key,
            it->type_name());
    return it->get<double>();
}

nlohmann::json parse_json(const std::string& text) {
    const auto j =
            parse_shallow_json(text.data(), text.data() + text.size());
    FAISS_THROW_IF_NOT_FMT(
            j.is_object(),
            "rope_scaling: '%.200s' is not a JSON object",
            text.c_str());
    // One that is misspelt would leave its default in place.
    constexpr std::array kKnown = {
            "rope_type", "type", "rope_theta", "finetuned", "factor",
            "original_max_position_embeddings", "low_freq_factor",
            "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
            "mscale", "mscale_all_dim", "truncate"};
    for (const auto& [key, value] : j.items()) {
        FAISS_THROW_IF_NOT_FMT(
                std::find(kKnown.begin(), kKnown.end(), key) != kKnown.end(),
                "rope_scaling: the key '%.200s' is not known",
                key.c_str());
    }
    return j;
}

double parse_factor(const std::string& text, const std::string& whole) {
    const auto factor = parse_number<double>(text);
    FAISS_THROW_IF_NOT_FMT(
            factor,
            "rope_scaling: '%s' has no number behind the colon",
            whole.c_str());
    return *factor;
}

/// The correction that YaRN's length factor asks for (arXiv 2309.00071, 3.4).
double yarn_magnitude(double factor, double mscale) {
    return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

/// Llama 3.1: wavelengths that fit the training context often keep their
/// frequency, those that do not fit are stretched by the factor.
double llama3_frequency(const RopeParams& p, double frequency) {
    const double turns =
            p.original_max_position_embeddings * frequency / (2 * kPi);
    if (turns > p.high_freq_factor) {
        return frequency;
    }
    if (turns < p.low_freq_factor) {
        return frequency / p.factor;
    }
    const double keep = (turns - p.low_freq_factor) /
            (p.high_freq_factor - p.low_freq_factor);
    return (1 - keep) * frequency / p.factor + keep * frequency;
}

/// YaRN: the same idea as a linear ramp over the index of the frequency.
double yarn_frequency(const RopeParams& p, double frequency, int i) {
    const auto index_of_turns = [&p](double turns) {
        return p.d *
                std::log(p.original_max_position_embeddings /
                         (turns * 2 * kPi)) /
                (2 * std::log(p.theta));
    };
    double low = index_of_turns(p.beta_fast);
    double high = index_of_turns(p.beta_slow);
    if (p.truncate) {
        low = std::floor(low);
        high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, p.d - 1.0);
    if (low == high) {
        high += 0.001;
    }
    const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
    return ramp * frequency / p.factor + (1 - ramp) * frequency;
}

/// Rotates by direction * position and multiplies by magnitude.
void turn(
        const RotaryEmbedding& rope,
        int64_t n,
        const int64_t* position,
        double direction,
        double magnitude,
        float* x) {
    const int d = rope.params.d, half = d / 2;
    const bool interleaved = rope.params.layout == RopeLayout::interleaved;
    for (int64_t i = 0; i < n; i++) {
        float* v = x + i * d;
        for (int j = 0; j < half; j++) {
            const double angle =
                    direction * position[i] * rope.inverse_frequency[j];
            const double c = magnitude * std::cos(angle);
            const double s = magnitude * std::sin(angle);
            const int a = interleaved ? 2 * j : j;
            const int b = interleaved ? 2 * j + 1 : j + half;
            const double va = v[a], vb = v[b];
            v[a] = static_cast<float>(va * c - vb * s);
            v[b] = static_cast<float>(va * s + vb * c);
        }
    }
}

} // namespace

bool RopeParams::operator==(const RopeParams& o) const {
    return d == o.d && theta == o.theta && layout == o.layout &&
            scaling_text() == o.scaling_text();
}

void RopeParams::check() const {
    FAISS_THROW_IF_NOT_FMT(
            d > 0 && d % 2 == 0, "rope: d = %d must be positive and even", d);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(theta) && theta > 1,
            "rope: theta = %g must be greater than 1",
            theta);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(factor) && factor > 0,
            "rope: factor = %g must be positive",
            factor);
    FAISS_THROW_IF_NOT_FMT(
            scaling != RopeScaling::ntk || d > 2,
            "rope: d = %d is too small for ntk scaling",
            d);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(original_max_position_embeddings) &&
                    original_max_position_embeddings > 0,
            "rope: original_max_position_embeddings = %g must be positive",
            original_max_position_embeddings);
    FAISS_THROW_IF_NOT_FMT(
            scaling != RopeScaling::llama3 ||
                    (low_freq_factor > 0 &&
                     high_freq_factor > low_freq_factor),
            "rope: high_freq_factor = %g must exceed low_freq_factor = %g > 0",
            high_freq_factor,
            low_freq_factor);
    FAISS_THROW_IF_NOT_FMT(
            scaling != RopeScaling::yarn ||
                    (beta_slow > 0 && beta_fast > beta_slow),
            "rope: beta_fast = %g must exceed beta_slow = %g > 0",
            beta_fast,
            beta_slow);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(attention_factor) && attention_factor >= 0,
            "rope: attention_factor = %g must not be negative",
            attention_factor);
}

void RopeParams::set_scaling(const std::string& text) {
    RopeParams p;
    p.d = d;
    p.theta = theta;
    p.layout = layout;
    const size_t colon = text.find(':');
    const std::string kind = text.substr(0, colon);
    const std::string rest =
            colon == std::string::npos ? "" : text.substr(colon + 1);
    if (text.empty()) {
        p.scaling = RopeScaling::none;
    } else if (kind == "linear" || kind == "ntk") {
        p.scaling = kind == "ntk" ? RopeScaling::ntk : RopeScaling::linear;
        p.factor = parse_factor(rest, text);
    } else if (kind == "llama3" || kind == "yarn") {
        const auto j = parse_json(rest);
        p.scaling =
                kind == "yarn" ? RopeScaling::yarn : RopeScaling::llama3;
        p.factor = number(j, "factor", 0);
        p.original_max_position_embeddings =
                number(j,
                       "original_max_position_embeddings",
                       p.original_max_position_embeddings);
        p.low_freq_factor = number(j, "low_freq_factor", p.low_freq_factor);
        p.high_freq_factor = number(j, "high_freq_factor", p.high_freq_factor);
        p.beta_fast = number(j, "beta_fast", p.beta_fast);
        p.beta_slow = number(j, "beta_slow", p.beta_slow);
        p.attention_factor = number(j, "attention_factor", 0);
        const double mscale = number(j, "mscale", 0);
        const double mscale_all = number(j, "mscale_all_dim", 0);
        if (p.attention_factor == 0 && mscale != 0 && mscale_all != 0) {
            p.attention_factor = yarn_magnitude(p.factor, mscale) /
                    yarn_magnitude(p.factor, mscale_all);
        }
        const auto truncate = j.value("truncate", nlohmann::json());
        FAISS_THROW_IF_NOT_FMT(
                truncate.is_null() || truncate.is_boolean(),
                "rope_scaling: truncate is of type %s, not true or false",
                truncate.type_name());
        p.truncate = truncate.is_null() || truncate.get<bool>();
    } else {
        FAISS_THROW_FMT(
                "rope_scaling: '%s' must be empty, linear:S, ntk:S, "
                "llama3:{json} or yarn:{json}",
                text.c_str());
    }
    if (d != 0) {
        p.check();
    }
    *this = p;
}

std::string RopeParams::scaling_text() const {
    switch (scaling) {
        case RopeScaling::none:
            return "";
        case RopeScaling::linear:
            return fmt::format("linear:{}", factor);
        case RopeScaling::ntk:
            return fmt::format("ntk:{}", factor);
        case RopeScaling::llama3:
            return "llama3:" +
                    nlohmann::json{
                            {"factor", factor},
                            {"low_freq_factor", low_freq_factor},
                            {"high_freq_factor", high_freq_factor},
                            {"original_max_position_embeddings",
                             original_max_position_embeddings}}
                            .dump();
        case RopeScaling::yarn:
            return "yarn:" +
                    nlohmann::json{
                            {"factor", factor},
                            {"beta_fast", beta_fast},
                            {"beta_slow", beta_slow},
                            {"attention_factor", attention_factor},
                            {"truncate", truncate},
                            {"original_max_position_embeddings",
                             original_max_position_embeddings}}
                            .dump();
    }
    FAISS_THROW_FMT("rope: scaling = %d is unknown", int(scaling));
}

RotaryEmbedding::RotaryEmbedding(const RopeParams& p) : params(p) {
    p.check();
    const double theta = p.scaling == RopeScaling::ntk
            ? p.theta * std::pow(p.factor, p.d / (p.d - 2.0))
            : p.theta;
    inverse_frequency.resize(p.d / 2);
    for (int i = 0; i < p.d / 2; i++) {
        double frequency = std::pow(theta, -2.0 * i / p.d);
        if (p.scaling == RopeScaling::linear) {
            frequency /= p.factor;
        } else if (p.scaling == RopeScaling::llama3) {
            frequency = llama3_frequency(p, frequency);
        } else if (p.scaling == RopeScaling::yarn) {
            frequency = yarn_frequency(p, frequency, i);
        }
        inverse_frequency[i] = frequency;
    }
    if (p.scaling == RopeScaling::yarn) {
        magnitude = p.attention_factor != 0 ? p.attention_factor
                                            : yarn_magnitude(p.factor, 1);
    }
    for (double frequency : inverse_frequency) {
        FAISS_THROW_IF_NOT_FMT(
                std::isfinite(frequency) && std::isfinite(magnitude) &&
                        std::isfinite(1 / magnitude),
                "rope: factor = %g, theta = %g and attention_factor = %g give a frequency "
                "of %g and a magnitude of %g",
                p.factor,
                p.theta,
                p.attention_factor,
                frequency,
                magnitude);
    }
}

void RotaryEmbedding::rotate(int64_t n, const int64_t* position, float* x)
        const {
    turn(*this, n, position, 1, magnitude, x);
}

void RotaryEmbedding::derotate(int64_t n, const int64_t* position, float* x)
        const {
    turn(*this, n, position, -1, 1 / magnitude, x);
}

} // namespace faiss_saap
