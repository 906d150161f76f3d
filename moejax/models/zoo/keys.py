"""The keys of a config.json that any family may have besides those it reads; all others are errors.

A family's module has `READ`, the keys that it reads, and `HARMLESS`, those that change nothing that moejax
computes.
"""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Who wrote the file and how it is loaded; what is computed beside the logits; dropout, of which there is none
# here; special tokens and quantised tensors, which `moejax.interop` reads.
HARMLESS = words(
    """
    architectures auto_map dtype model_type name_or_path tokenizer_class torch_dtype torchscript
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
    return_dict quantization_config output_attentions output_hidden_states output_router_logits
    tie_last_hidden_states finetuning_task id2label label2id num_labels prefix problem_type
    task_specific_params tf_legacy_loss attention_dropout pretraining_tp bos_token_id eos_token_id
    pad_token_id sep_token_id decoder_start_token_id
    """
)

# Options of generation that old versions of `transformers` kept here. Version 5 drops them, and reads
# generation_config.json alone.
GENERATION = words(
    """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind
    temperature top_k top_p typical_p
    """
)

# Keys that would change the model, with the one value that does not.
NEUTRAL = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": {},
    "pruned_heads": {},
    "router_jitter_noise": 0.0,
    "swiglu_alpha": 1.702,
    "tie_encoder_decoder": False,
}


def unknown(hf: dict, family) -> list[str]:
    """The keys of a config.json that a family's module neither reads nor knows to be harmless. Null says
    nothing, and a name that begins with '_' is a note of whoever wrote the file."""
    known = family.READ | family.HARMLESS | HARMLESS | GENERATION
    return [
        key
        for key, value in hf.items()
        if key not in known
        and value is not None
        and not key.startswith("_")
        and not (key in NEUTRAL and value == NEUTRAL[key])
    ]
