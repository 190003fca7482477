{{- define "vigil.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "vigil.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "vigil.name" .) .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name (include "vigil.name" .) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* Called with (dict "root" $ "component" "ingest"). */}}
{{- define "vigil.selector" -}}
app.kubernetes.io/name: {{ include "vigil.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Without versions: a new chart must not restart the pods of Valkey and ReductStore, which everybody waits for. */}}
{{- define "vigil.lastingLabels" -}}
{{ include "vigil.selector" . }}
app.kubernetes.io/part-of: vigil
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "vigil.labels" -}}
{{ include "vigil.lastingLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "vigil.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ with $image.prefix }}{{ . }}/{{ end }}{{ .component }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Whether each service is a Redis user of its own. */}}
{{- define "vigil.redisUsers" -}}
{{- if ternary .Values.valkey.users .Values.externalRedis.users .Values.valkey.enabled }}yes{{ end -}}
{{- end }}

{{- define "vigil.redisUrl" -}}
{{- $url := .root.Values.externalRedis.url -}}
{{- if .root.Values.valkey.enabled -}}
{{- $url = printf "%s://%s-valkey:6379/0" (ternary "rediss" "redis" .root.Values.tls.enabled) (include "vigil.fullname" .root) -}}
{{- end -}}
{{- if include "vigil.redisUsers" .root }}{{ $url = replace "://" (printf "://%s@" .component) $url }}{{ end -}}
{{ $url }}
{{- end }}

{{- define "vigil.storeUrl" -}}
{{- if .Values.reductstore.enabled -}}
{{ ternary "https" "http" .Values.tls.enabled }}://{{ include "vigil.fullname" . }}-reductstore:8383
{{- else -}}
{{ .Values.externalReductStore.url }}
{{- end -}}
{{- end }}

{{- define "vigil.tlsSecret" -}}
{{- if .Values.tls.certManager.enabled }}{{ include "vigil.fullname" . }}-tls{{ else }}{{ .Values.tls.existingSecret }}{{ end -}}
{{- end }}

{{- define "vigil.redisSecret" -}}
{{- ternary .Values.valkey.existingSecret .Values.externalRedis.existingSecret .Values.valkey.enabled -}}
{{- end }}

{{- define "vigil.storeSecret" -}}
{{- ternary .Values.reductstore.existingSecret .Values.externalReductStore.existingSecret .Values.reductstore.enabled -}}
{{- end }}

{{- define "vigil.redisCaSecret" -}}
{{- if .Values.valkey.enabled }}{{ if .Values.tls.enabled }}{{ include "vigil.tlsSecret" . }}{{ end }}{{ else }}{{ .Values.externalRedis.caSecret }}{{ end -}}
{{- end }}

{{- define "vigil.storeCaSecret" -}}
{{- if .Values.reductstore.enabled }}{{ if .Values.tls.enabled }}{{ include "vigil.tlsSecret" . }}{{ end }}{{ else }}{{ .Values.externalReductStore.caSecret }}{{ end -}}
{{- end }}

{{/* Where every pod may run, and as whom. */}}
{{- define "vigil.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
serviceAccountName: {{ include "vigil.fullname" .root }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.runAsUser | int64 }}
  runAsGroup: {{ .root.Values.runAsUser | int64 }}
  fsGroup: {{ .root.Values.runAsUser | int64 }}
  # Volumes with many files would otherwise be walked at each start.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "vigil.selector" $ | nindent 8 }}
{{- end }}
{{- end }}

{{- define "vigil.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The page asks other services alone. */}}
{{- define "vigil.redisEnv" -}}
- {name: VIGIL_REDIS_URL, value: {{ include "vigil.redisUrl" . | quote }}}
{{- if include "vigil.redisSecret" .root }}
- {name: VIGIL_REDIS_PASSWORD_FILE, value: /etc/vigil/redis/password}
{{- end }}
{{- if include "vigil.redisCaSecret" .root }}
- {name: VIGIL_REDIS_CA_FILE, value: /etc/vigil/redis-ca/ca.crt}
{{- end }}
{{- end }}

{{/* Every service has these: TLS, tokens. */}}
{{- define "vigil.env" -}}
- {name: VIGIL_LOG_LEVEL, value: {{ .Values.logLevel | quote }}}
- {name: VIGIL_METRICS_PORT, value: "9090"}
{{- if .Values.tls.enabled }}
- {name: VIGIL_TLS_CERT_FILE, value: /etc/vigil/tls/tls.crt}
- {name: VIGIL_TLS_KEY_FILE, value: /etc/vigil/tls/tls.key}
- {name: VIGIL_TLS_CA_FILE, value: /etc/vigil/tls/ca.crt}
{{- if .Values.tls.clientCertificates }}
- {name: VIGIL_TLS_CLIENT_CA_FILE, value: /etc/vigil/tls/ca.crt}
{{- end }}
{{- end }}
{{- if .Values.auth.enabled }}
- {name: VIGIL_TOKENS_FILE, value: /etc/vigil/tokens/tokens.yaml}
- {name: VIGIL_TOKEN_FILE, value: /etc/vigil/token/token}
{{- end }}
- {name: VIGIL_HEALTH_BIND, value: "0.0.0.0:50060"}
{{- end }}

{{/* Folder below /etc/vigil: Secret that is mounted there. */}}
{{- define "vigil.secrets" -}}
{{- $secrets := dict -}}
{{- if ne .component "review" -}}
{{- with include "vigil.redisSecret" .root }}{{ $_ := set $secrets "redis" . }}{{ end -}}
{{- with include "vigil.redisCaSecret" .root }}{{ $_ := set $secrets "redis-ca" . }}{{ end -}}
{{- end -}}
{{- if .root.Values.tls.enabled }}{{ $_ := set $secrets "tls" (include "vigil.tlsSecret" .root) }}{{ end -}}
{{- if .root.Values.auth.enabled -}}
{{- $_ := set $secrets "tokens" .root.Values.auth.tokensSecret -}}
{{- $_ := set $secrets "token" .root.Values.auth.serviceTokenSecret -}}
{{- end -}}
{{- if eq .component "storage" -}}
{{- with include "vigil.storeSecret" .root }}{{ $_ := set $secrets "store" . }}{{ end -}}
{{- with include "vigil.storeCaSecret" .root }}{{ $_ := set $secrets "store-ca" . }}{{ end -}}
{{- end -}}
{{ toYaml $secrets }}
{{- end }}

{{/* A service of ours: (dict "root" $ "component" "ingest" "port" 50051 "values" .Values.ingest "env" LIST). */}}
{{- define "vigil.deployment" -}}
{{- $name := printf "%s-%s" (include "vigil.fullname" .root) .component -}}
{{- $secrets := include "vigil.secrets" . | fromYaml -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels: {{- include "vigil.labels" . | nindent 4 }}
spec:
  {{- if not (dig "autoscaling" "enabled" false .values) }}
  replicas: {{ .values.replicas | int64 }}
  {{- end }}
  revisionHistoryLimit: 3
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
  selector:
    matchLabels: {{- include "vigil.selector" . | nindent 6 }}
  template:
    metadata:
      labels: {{- include "vigil.labels" . | nindent 8 }}
      {{- with .root.Values.podAnnotations }}
      annotations: {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "vigil.pod" . | nindent 6 }}
      # Leaving the Service, then draining, then some seconds to close connections.
      terminationGracePeriodSeconds: {{ add 3 .values.drainSeconds 10 }}
      containers:
        - name: {{ .component }}
          image: {{ include "vigil.image" . | quote }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          securityContext: {{- include "vigil.containerSecurity" . | nindent 12 }}
          env:
            {{- include "vigil.env" .root | nindent 12 }}
            {{- if ne .component "review" }}
            {{- include "vigil.redisEnv" . | nindent 12 }}
            {{- end }}
            - {name: VIGIL_DRAIN_S, value: {{ .values.drainSeconds | int64 | quote }}}
            {{- if and .root.Values.otlp.endpoint (has .component (list "ingest" "storage")) }}
            - {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .root.Values.otlp.endpoint | quote }}}
            - {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
            - {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .root.Values.otlp.sampleRatio | quote }}}
            {{- with .root.Values.otlp.certificateFile }}
            - {name: OTEL_EXPORTER_OTLP_CERTIFICATE, value: {{ . | quote }}}
            {{- end }}
            {{- end }}
            {{- range $key, $value := .env }}
            - {name: VIGIL_{{ $key }}, value: {{ $value | toString | quote }}}
            {{- end }}
            {{- if and (eq .component "storage") (include "vigil.storeCaSecret" .root) }}
            - {name: SSL_CERT_FILE, value: /etc/vigil/store-ca/ca.crt}
            {{- end }}
          {{- $probe := "grpc: {port: 50060}" }}
          {{- if .http }}{{ $probe = printf "httpGet: {path: %s, port: http, scheme: %s}" .http (ternary "HTTPS" "HTTP" .root.Values.tls.enabled) }}{{ end }}
          ports:
            - {name: {{ ternary "http" "grpc" (not (empty .http)) }}, containerPort: {{ .port }}}
            - {name: metrics, containerPort: 9090}
            {{- if not .http }}
            - {name: health, containerPort: 50060}
            {{- end }}
          # Ten minutes: its Redis or store may still be coming.
          startupProbe:
            {{ $probe }}
            periodSeconds: 1
            timeoutSeconds: 5
            failureThreshold: 600
          readinessProbe:
            {{ $probe }}
            periodSeconds: 5
            timeoutSeconds: 5
          livenessProbe:
            {{ $probe }}
            periodSeconds: 10
            timeoutSeconds: 10
            failureThreshold: 6
          lifecycle:
            # Until every node has taken the pod out of the Service.
            preStop: {exec: {command: [sleep, "3"]}}
          resources: {{- toYaml .values.resources | nindent 12 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
            {{- range $folder, $_ := $secrets }}
            - {name: {{ $folder }}, mountPath: /etc/vigil/{{ $folder }}, readOnly: true}
            {{- end }}
      volumes:
        - {name: tmp, emptyDir: {sizeLimit: 256Mi}}
        {{- range $folder, $secret := $secrets }}
        {{- if and (eq $folder "redis") (include "vigil.redisUsers" $.root) }}
        - {name: redis, secret: {secretName: {{ $secret }}, defaultMode: 0440, items: [{key: {{ $.component }}, path: password}]}}
        {{- else }}
        - {name: {{ $folder }}, secret: {secretName: {{ $secret }}, defaultMode: 0440}}
        {{- end }}
        {{- end }}
{{- end }}

{{- define "vigil.headless" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "vigil.fullname" .root }}-{{ .component }}{{ .suffix }}
  labels: {{- include "vigil.labels" . | nindent 4 }}
spec:
  # Clients see every pod and share their calls out themselves.
  clusterIP: None
  selector: {{- include "vigil.selector" . | nindent 4 }}
  ports:
    - {name: grpc, port: {{ .port }}, targetPort: grpc, appProtocol: grpc}
    - {name: metrics, port: 9090, targetPort: metrics}
{{- end }}

{{- define "vigil.pdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "vigil.fullname" .root }}-{{ .component }}
  labels: {{- include "vigil.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "vigil.selector" . | nindent 6 }}
{{- end }}

{{/* Hosts that the certificate is for. */}}
{{- define "vigil.hosts" -}}
{{- range list "ingest" "ingest-pods" "storage" "shadow" "review" "valkey" "reductstore" }}
{{- $host := printf "%s-%s" (include "vigil.fullname" $) . }}
- {{ $host }}
- {{ $host }}.{{ $.Release.Namespace }}
- {{ $host }}.{{ $.Release.Namespace }}.svc
- {{ $host }}.{{ $.Release.Namespace }}.svc.cluster.local
{{- end }}
{{- /* Workers, by the Service vigil-NAME beside the AnomalyModel of that name. */}}
- {{ printf "*.%s.svc" (default .Release.Namespace .Values.review.modelsNamespace) | quote }}
{{- /* For kubectl port-forward. */}}
- localhost
{{- with .Values.tls.certManager.extraDnsNames }}
{{ toYaml . }}
{{- end }}
{{- end }}
