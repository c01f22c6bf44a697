# SPDX-License-Identifier: Apache-2.0
"""Tiny models in the published forms: the keys of the published configs, sizes divided, one entry a case.

Keys and values that no reader should need are kept as published, so that a reader that trips over them is found out.
"""

from dataclasses import dataclass


SH_7B = {  # config.json of togethercomputer/StripedHyena-Nous-7B
    "architectures": ["StripedHyenaModelForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_hyena.StripedHyenaConfig",
        "AutoModelForCausalLM": "modeling_hyena.StripedHyenaModelForCausalLM",
    },
    "model_type": "stripedhyena",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_filters": 32,
    "inner_mlp_size": 48,
    "attn_layer_idxs": [1, 3],
    "hyena_layer_idxs": [0, 2, 4],  # one more than there are layers, as published
    "num_layers": 4,
    "tie_embeddings": False,
    "short_filter_length": 3,
    "num_attention_heads": 4,
    "proj_groups": 2,
    "hyena_filter_groups": 1,
    "split_k0": True,
    "column_split_hyena": True,
    "column_split": False,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "short_filter_bias": True,
    "mha_out_proj_bias": False,
    "qkv_proj_bias": False,
    "final_norm": True,
    "use_cache": True,
    "use_flash_attention_2": True,
    "use_flash_attn": True,
    "use_flash_rmsnorm": True,
    "use_flash_depthwise": False,
    "use_flashfft": False,
    "inference_mode": False,
    "prefill_style": "fft",
    "max_seqlen": 32768,
    "eps": 1e-05,
    "state_size": 2,
    "rotary_emb_base": 500000,
    "smeared_gqa": False,
    "make_vocab_size_divisible_by": 8,
    "log_intermediate_values": False,
    "torch_dtype": "bfloat16",
}

EVO_1 = {  # config.json of togethercomputer/evo-1-8k-base
    **SH_7B,
    "vocab_size": 512,
    "inner_mlp_size": 96,  # 10928 published: what the rule of the config without it gives, too
    "attn_layer_idxs": [2],
    "hyena_layer_idxs": [0, 1, 3],
    "tie_embeddings": True,
    "proj_groups": 1,
    "mha_out_proj_bias": True,
    "qkv_proj_bias": True,
    "use_flash_rmsnorm": False,
    "max_seqlen": 8192,
    "eps": 1e-06,
    "state_size": 8,
    "rotary_emb_base": 10000,
    "mlp_activation": "gelu",
    "inner_size_multiple_of": 16,
}

EVO_1_131K = {
    **EVO_1,
    "max_seqlen": 131072,
    "use_interpolated_rotary_pos_emb": True,
    "rotary_emb_scaling_factor": 16,
}

EVO_1_YML = {  # evo-1-8k-base_inference.yml of evo-model: the MLP's width is left to a rule, no rotary base
    **{key: value for key, value in EVO_1.items() if key not in ("rotary_emb_base", "auto_map", "architectures")},
    "inner_mlp_size": None,
    "max_sequence_len": 8192,
    "mlp_init_method": "torch.nn.init.zeros_",
    "tokenizer_type": "CharLevelTokenizer",
}

EVO_2 = {  # configs/evo2-7b-8k.yml of evo2
    "model_name": "shc-evo2-7b-8k-2T-v2",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_filters": 32,
    "hcl_layer_idxs": [2, 5],
    "hcm_layer_idxs": [1],
    "hcs_layer_idxs": [0, 4],
    "attn_layer_idxs": [3],
    "hcm_filter_length": 128,
    "hcl_filter_groups": 32,
    "hcm_filter_groups": 8,
    "hcs_filter_groups": 8,
    "hcs_filter_length": 7,
    "num_layers": 6,
    "short_filter_length": 3,
    "num_attention_heads": 4,
    "short_filter_bias": False,
    "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_",
    "eps": 1e-06,
    "state_size": 16,
    "rotary_emb_base": 10000,
    "make_vocab_size_divisible_by": 8,
    "inner_size_multiple_of": 16,
    "inner_mlp_size": 48,
    "log_intermediate_values": False,
    "proj_groups": 1,
    "hyena_filter_groups": 1,
    "column_split_hyena": False,
    "column_split": True,
    "interleave": True,
    "evo2_style_activations": True,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "tie_embeddings": True,
    "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True,
    "hyena_flip_x1x2": False,
    "qkv_proj_bias": False,
    "use_fp8_input_projections": True,
    "max_seqlen": 32768,
    "max_batch_size": 1,
    "final_norm": True,
    "use_flash_attn": True,
    "use_flash_rmsnorm": False,
    "use_flash_depthwise": False,
    "use_flashfft": False,
    "use_laughing_hyena": False,
    "inference_mode": True,
    "tokenizer_type": "CharLevelTokenizer",
    "prefill_style": "fft",
    "mlp_activation": "gelu",
    "print_activations": False,
}

EVO_2_1M = {
    **EVO_2,
    "max_seqlen": 1048576,
    "rotary_emb_scaling_factor": 128,
    "use_interpolated_rotary_pos_emb": True,
}

EVO_2_40B = {  # other sizes: filters shared by other numbers of channels, another rotary base, two attention layers
    **EVO_2_1M,
    "model_name": "shc-evo2-40b-8k-11T-v2",
    "hidden_size": 64,
    "num_filters": 64,
    "hcl_filter_groups": 64,
    "hcm_filter_groups": 4,
    "hcs_filter_groups": 16,
    "num_attention_heads": 8,
    "attn_layer_idxs": [3, 5],
    "hcl_layer_idxs": [2],
    "rotary_emb_base": 1000000,
    "inner_size_multiple_of": 128,
    "inner_mlp_size": 176,
}


@dataclass(frozen=True)
class Case:
    """One published layout: which reference runs it, its config, and how files are written.

    Args:
        family: "stripedhyena", "evo1" or "evo2"; also the name of our layout.
        config: Config with the published keys.
        config_file: "config.json", or the name of a .yml file.
        form: "safetensors", "shards" (three safetensors files and an index), "pt", "parts" (bytes of a .pt, cut), or
            "given" (a safetensors file that is there).
        file: Name of the file with weights.
        prefix: Whether keys begin with "backbone.".
        rounded_frequencies: Whether stored rotary frequencies are float32 numbers rounded to bfloat16.
        length: Tokens in a row.
        dtype: Of the stored weights; poles and residues are float32 in all files.
        residues: Factor on the residues of modal filters: 0 leaves only what both sides store in the same numbers.
    """

    family: str
    config: dict
    config_file: str = "config.json"
    form: str = "safetensors"
    file: str = "model.safetensors"
    prefix: bool = True
    rounded_frequencies: bool = False
    length: int = 45
    dtype: str = "float32"
    residues: float = 1.0


PUBLISHED = {
    "sh_7b_shards": Case("stripedhyena", SH_7B, form="shards", dtype="bfloat16"),
    "sh_7b_plain_norm": Case("stripedhyena", {**SH_7B, "use_flash_rmsnorm": False}),
    "sh_7b_tied": Case("stripedhyena", {**SH_7B, "tie_embeddings": True}),
    "evo_1_8k": Case("evo1", EVO_1, form="shards", dtype="bfloat16"),
    "evo_1_131k": Case("evo1", EVO_1_131K),
    "evo_1_yml": Case("evo1", EVO_1_YML, config_file="evo-1-8k-base_inference.yml", prefix=False),
    "evo_2_7b_8k": Case("evo2", EVO_2, "evo2-7b-8k.yml", "pt", "evo2_7b_base.pt", prefix=False),
    "evo_2_7b_1m": Case(
        "evo2", EVO_2_1M, "config.json", "pt", "evo2_7b.pt", prefix=False, rounded_frequencies=True, length=150
    ),
    "evo_2_40b": Case("evo2", EVO_2_40B, "evo2-40b-1m.yml", "parts", "evo2_40b.pt", prefix=False, dtype="bfloat16"),
}
