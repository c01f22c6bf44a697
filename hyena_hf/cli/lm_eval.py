"""Evaluate Hyena models with lm-eval: `hyena-lm-eval` is the `lm-eval` command with this package's models registered.

    hyena-lm-eval run --model hf --model_args pretrained=DIR,dtype=float32 --tasks lambada_openai --batch_size 8
    hyena-lm-eval run --model hf --model_args pretrained=DIR --include_path MY_TASKS --tasks my_task

lm-eval loads no plug-ins, so stock `lm-eval` would not know `model_type: hyena`. It pads loglikelihood requests on the
right and passes no attention mask: a causal model scores them the same in any batch.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run lm-eval's command line on `sys.argv`."""
    import hyena_hf  # noqa: F401  registers the Auto classes

    try:
        import lm_eval  # noqa: F401  alone: a module that lm-eval itself lacks is another error
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit("hyena-lm-eval needs lm-eval: pip install 'hyena-hf[eval]'")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
