//! RoPE frequencies.
