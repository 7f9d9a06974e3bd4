"""The loop over plain bookkeeping: requests in, step plans out, tokens back. Without a tensor."""
