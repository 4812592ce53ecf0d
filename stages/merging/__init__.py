"""How stages become one model: mergekit's methods with ours beside them, run tensor by tensor."""
