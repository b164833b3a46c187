"""Security profiles of resource groups and kernels"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("resource_groups", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("security_profile", sa.String(length=16), server_default="DEFAULT", nullable=False)
        )
    with op.batch_alter_table("kernels", schema=None) as batch_op:
        batch_op.add_column(sa.Column("strict", sa.Boolean(), server_default=sa.text("0"), nullable=False))
