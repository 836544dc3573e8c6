"""Train one net: dataset, module, callbacks."""
