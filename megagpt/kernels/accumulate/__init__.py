"""The sum of gradients, in fp32."""
