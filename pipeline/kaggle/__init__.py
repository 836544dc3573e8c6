"""All access to Kaggle: download, submit, ledger."""
