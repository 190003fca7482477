{{/* Combinations that can't work, each with a sentence. */}}
{{- define "vigil.check" -}}
{{- $v := .Values -}}
{{- if and $v.valkey.enabled $v.externalRedis.url }}{{ fail "Two Redis: give externalRedis.url, or leave valkey.enabled true, not both." }}{{ end -}}
{{- if and (not $v.valkey.enabled) (not $v.externalRedis.url) }}{{ fail "No Redis: set externalRedis.url, or valkey.enabled to true." }}{{ end -}}
{{- if and $v.reductstore.enabled $v.externalReductStore.url }}{{ fail "Two ReductStores: give externalReductStore.url, or leave reductstore.enabled true, not both." }}{{ end -}}
{{- if and (not $v.reductstore.enabled) (not $v.externalReductStore.url) }}{{ fail "No ReductStore: set externalReductStore.url, or reductstore.enabled to true." }}{{ end -}}
{{- $normal := int64 $v.storage.retention.normalBytes }}{{- if and (gt $normal 0) (lt $normal 268435456) }}{{ fail "storage.retention.normalBytes is too small: 0 for no quota, or at least 268435456." }}{{ end -}}
{{- if and $v.tls.enabled (not $v.tls.existingSecret) (not $v.tls.certManager.enabled) }}{{ fail "TLS without a certificate: name its Secret in tls.existingSecret, or set tls.certManager.enabled." }}{{ end -}}
{{- if and $v.valkey.users (not $v.valkey.existingSecret) }}{{ fail "Redis users without passwords: set valkey.existingSecret to the Secret with users.acl." }}{{ end -}}
{{- if and $v.externalRedis.users (not $v.externalRedis.existingSecret) }}{{ fail "Redis users without passwords: set externalRedis.existingSecret." }}{{ end -}}
{{- if and $v.externalRedis.users (contains "@" $v.externalRedis.url) }}{{ fail "externalRedis.users gives each service its own user: leave the one in externalRedis.url out." }}{{ end -}}
{{- if and $v.tls.certManager.enabled (not $v.tls.certManager.issuer) }}{{ fail "cert-manager without an issuer: set tls.certManager.issuer." }}{{ end -}}
{{- if and $v.tls.certManager.enabled (not $v.tls.enabled) }}{{ fail "tls.certManager.enabled does nothing without tls.enabled: set both." }}{{ end -}}
{{- if and $v.tls.clientCertificates (not $v.tls.enabled) }}{{ fail "tls.clientCertificates needs tls.enabled." }}{{ end -}}
{{- if and $v.auth.enabled (not (and $v.auth.tokensSecret $v.auth.serviceTokenSecret)) }}{{ fail "Tokens without Secrets: set auth.tokensSecret and auth.serviceTokenSecret." }}{{ end -}}
{{- if and $v.auth.enabled (not $v.tls.enabled) }}{{ fail "Tokens over plain text can be read on the way: auth.enabled needs tls.enabled." }}{{ end -}}
{{- if and $v.reductstore.enabled (le (float64 $v.storage.confirmAfterSeconds) (mulf 2 $v.reductstore.compactionIntervalSeconds)) }}{{ fail "storage.confirmAfterSeconds must be over twice reductstore.compactionIntervalSeconds: what is looked for earlier may still be lost with the server." }}{{ end -}}
{{- if and $v.ingest.autoscaling.enabled (gt (int $v.ingest.autoscaling.minReplicas) (int $v.ingest.autoscaling.maxReplicas)) }}{{ fail "ingest.autoscaling.minReplicas is over maxReplicas." }}{{ end -}}
{{- if and $v.otlp.certificateFile (not (hasPrefix "https://" $v.otlp.endpoint)) }}{{ fail "otlp.certificateFile is for a collector at https://: set otlp.endpoint so." }}{{ end -}}
{{- if and $v.review.ingress.enabled (not $v.review.ingress.host) }}{{ fail "An Ingress without a host would take every request: set review.ingress.host." }}{{ end -}}
{{- end }}
