"""How the database of keys came to be as it is, step by step; run by alembic."""
