"""Text half of ViLT's embedding, packed rows: y = dropout(LayerNorm(word + token_type + position)) + modality[0].

Shapes: input_ids [n] int64/int32 (rows of `word`) or, in place of it, inputs_embeds [n, D]; position_ids [n];
token_type_ids [n] or None (all 0); word [V, D]; position [L, D]; token_type [S, D]; ln_weight, ln_bias [D];
modality [M, D], of which row 0 is text, or None. Returns [n, D]. The modality row comes after the norm and the dropout.
Row `padding_idx` of `word` is used like any other but gets no gradient, as in nn.Embedding.
Source: BERT embeddings (Devlin et al. 2019) as used in ViLT, HuggingFace `TextEmbeddings` and `ViltEmbeddings`.
"""

import torch.nn.functional as F


def text_embed(
    input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality, *,
    eps, padding_idx=None, dropout_p=0.0,
):  # fmt: skip
    rows = F.embedding(input_ids, word, padding_idx) if inputs_embeds is None else inputs_embeds
    segment = token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type)
    x = rows + segment + F.embedding(position_ids, position)
    x = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    x = F.dropout(x, dropout_p)
    return x if modality is None else x + modality[0]
