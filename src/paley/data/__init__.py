"""Text: its sources, and blocks of token ids made from it. Each set of blocks has one role."""

from paley.data.blocks import (
    Role,
    TokenBlocks,
    blocks_from_ids,
    check_disjoint,
    require,
    role_part,
    token_blocks,
)
from paley.data.texts import documents

__all__ = [
    "Role",
    "TokenBlocks",
    "blocks_from_ids",
    "check_disjoint",
    "documents",
    "require",
    "role_part",
    "token_blocks",
]
