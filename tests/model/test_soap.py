"""SOAP's algebra: the shortcut equals the definition, and the zero token only scales."""

import math

import torch
import torch.nn.functional as F

from microclip_deploy.model.soap import SOAP, TokenMean, masked_mean
from microclip_deploy.model.token_fusion import fused_logits


def definition(soap: SOAP, patches: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Apply the key and value maps to every token, zero token included."""
    query = soap.query_proj(masked_mean(patches, mask))
    padded = F.pad(patches, (0, 0, 0, 1))
    scores = (query[:, None] @ soap.key_proj(padded).transpose(1, 2)) / math.sqrt(patches.shape[-1])
    pooled: torch.Tensor = (scores.softmax(-1) @ soap.value_proj(padded))[:, 0]
    return pooled


def test_shortcut_equals_the_definition() -> None:
    torch.manual_seed(0)
    soap = SOAP(16).double()
    for linear in (soap.query_proj, soap.key_proj, soap.value_proj):
        torch.nn.init.normal_(linear.weight, std=0.3)
    patches, mask = torch.randn(3, 25, 16).double(), torch.rand(3, 25) > 0.6
    torch.testing.assert_close(soap(patches, mask).vector, definition(soap, patches, mask))


def test_attention_sums_to_one_with_the_zero_token() -> None:
    soap = SOAP(8)
    found = soap(torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool))
    assert found.attention.shape == (2, 10)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(2))


def test_token_mean_ignores_the_mask() -> None:
    patches = torch.randn(2, 9, 8)
    found = TokenMean()(patches, torch.zeros(2, 9, dtype=torch.bool))
    torch.testing.assert_close(found.vector, patches.mean(1))


def test_share_one_leaves_the_fine_grained_token_out() -> None:
    cls, fg, matrix = (F.normalize(torch.randn(3, 4), dim=-1) for _ in range(3))
    torch.testing.assert_close(fused_logits(cls, fg, matrix, 1.0), 100 * cls @ matrix.T)
