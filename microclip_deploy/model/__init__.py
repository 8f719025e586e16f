"""The method's figure: backbone, saliency, SOAP, TokenFusion and the two-headed classifier."""
