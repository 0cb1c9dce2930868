"""Whole architectures. Light on purpose: `import undivided` passes through here."""
