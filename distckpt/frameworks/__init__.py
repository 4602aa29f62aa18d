"""What is particular to one framework's arrays and nets: one module a framework, none imported."""
