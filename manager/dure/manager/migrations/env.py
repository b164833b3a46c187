"""Runs Alembic on the connection, and in the transaction, that the store hands over."""

from alembic import context

from dure.manager.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
