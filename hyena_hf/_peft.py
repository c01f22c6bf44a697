# SPDX-License-Identifier: Apache-2.0
"""Tell PEFT which modules of a Hyena model to adapt where its config names none.

PEFT looks defaults up by `model_type` in tables that list transformers' own models only. It may be imported before or
after us and we do not import it, so ours are entered whenever a `HyenaConfig` is turned into a dict: that is how PEFT
reads the `model_type`, right before it looks it up.
"""

import sys


# the projections of all mixers; MLPs stay as they are, as in PEFT's defaults for other models
MIXERS = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
OTHERS = {
    "LNTUNING_TARGET": ("mixer_norm", "mlp_norm", "norm", "embed_norm"),
    "IA3_TARGET": ("in_proj", "k_proj", "v_proj", "down_proj"),
    "IA3_FEEDFORWARD": ("down_proj",),
}


def enter_peft_defaults(model_type: str) -> None:
    """Add a model type to the tables of PEFT, where PEFT has been imported; entries that exist are kept."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in list(vars(constants).items()) if constants else ():
        if name.endswith("_MODULES_MAPPING"):
            method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
            table.setdefault(model_type, list(OTHERS.get(method, MIXERS)))
