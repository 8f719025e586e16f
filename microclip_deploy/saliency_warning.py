"""The one wording of what to do when the saliency says nothing."""

UNINFORMATIVE_SHARE = 0.5
"""Above this share of complete graphs the saliency carries no information for most images."""


def saliency_warning(share: float) -> str | None:
    """Return the warning with its remedy, or None where there is nothing to warn of.

    Args:
        share: images whose graph is complete, 0 to 1.
    """
    if share <= UNINFORMATIVE_SHARE:
        return None
    return (
        f"the saliency carries no information: {share:.0%} of the graphs join every pair of "
        "tokens; adapt again with --set ncut.affinity=centered_cosine"
    )
