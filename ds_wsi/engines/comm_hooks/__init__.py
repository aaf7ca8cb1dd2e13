"""Communication hooks: registered with an engine, they reduce its gradients."""
