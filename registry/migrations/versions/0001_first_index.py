"""The first index: audit log, bases with routing artefacts, experts, consent ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def text(name: str, *items: sa.schema.SchemaItem) -> sa.Column[str]:
    return sa.Column(name, sa.Text, *items, nullable=False)


def integer(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False)


def upgrade() -> None:
    op.create_table(
        "audit",
        integer("sequence"),
        text("at"),
        text("action"),
        text("subject"),
        text("detail"),
        text("previous"),
        text("digest"),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("digest"),
        sqlite_strict=True,
    )
    op.create_table(
        "bases",
        text("name"),
        text("fingerprint"),
        text("tokenizer_fingerprint"),
        text("record"),
        text("created"),
        sa.PrimaryKeyConstraint("name"),
        sqlite_strict=True,
    )
    op.create_table(
        "base_routings",
        text("base", sa.ForeignKey("bases.name")),
        integer("version"),
        text("record"),
        text("created"),
        sa.PrimaryKeyConstraint("base", "version"),
        sqlite_strict=True,
    )
    op.create_table(
        "experts",
        integer("sequence"),
        text("name"),
        integer("version"),
        text("owner"),
        text("domain"),
        text("kind"),
        text("license"),
        text("base_name", sa.ForeignKey("bases.name")),
        text("base_fingerprint"),
        text("digest"),
        integer("parameters"),
        integer("bytes"),
        text("created"),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("digest"),
        sa.UniqueConstraint("name", "version"),
        sqlite_strict=True,
    )
    op.create_table(
        "consents",
        integer("sequence"),
        text("owner"),
        text("action"),
        text("at"),
        text("who"),
        text("reason"),
        sa.PrimaryKeyConstraint("sequence"),
        sqlite_strict=True,
    )
    # Append-only, also against a slip of our own: an owner's opt-out must not be edited away.
    for table in ("audit", "consents"):
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
