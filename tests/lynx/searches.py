"""Ways to search for an answer, and the model that searches as transformers does."""

import copy

SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 5, "length_penalty": -2.0, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "top_p": 0.9, "top_k": 20},
    "sampling beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
}
NEW = {"max_new_tokens": 8}


def plain(model):
    """The same model, with transformers' own attention and cache."""
    model = copy.deepcopy(model)
    model.get_decoder().config._attn_implementation = "eager"
    return model
