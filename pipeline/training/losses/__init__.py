"""Losses, one file each. Soft ones are listed in `pipeline.params.losses`.

Logits are (N, classes), or (N, classes, ...) where every position has a class of its own. They are
computed in float32 or better whatever autocast makes of the network, and no gradient flows into a
teacher.
"""
