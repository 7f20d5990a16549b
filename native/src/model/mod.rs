//! Finding and loading language models and tokenizers.
