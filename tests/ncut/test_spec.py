"""One wording, above one threshold."""

import pytest

from microclip_deploy.ncut.spec import UNINFORMATIVE_SHARE, saliency_warning


@pytest.mark.parametrize("share", [0.0, UNINFORMATIVE_SHARE])
def test_nothing_is_said_up_to_the_threshold(share: float) -> None:
    assert saliency_warning(share) is None


def test_the_warning_holds_share_and_remedy() -> None:
    found = saliency_warning(0.75)
    assert found is not None
    assert "75%" in found
    assert "--set ncut.affinity=centered_cosine" in found
