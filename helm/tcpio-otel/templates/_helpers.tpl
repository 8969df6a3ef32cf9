{{- define "tcpio-otel.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "tcpio-otel.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "tcpio-otel.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end }}

{{- define "tcpio-otel.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tcpio-otel.labels" -}}
{{ include "tcpio-otel.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tcpio-otel.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A key of the agent's configuration, empty where it is unset: dict "config" CONFIG "key" "export.logs.endpoint". */}}
{{- define "tcpio-otel.key" -}}
{{- $found := .config -}}
{{- range splitList "." .key -}}
{{- $found = kindIs "map" $found | ternary (get ($found | default dict) .) "" -}}
{{- end -}}
{{- if not (kindIs "invalid" $found) -}}
{{- /* Helm reads whole numbers as floats too, and would write large ones with an exponent. */ -}}
{{- if and (kindIs "float64" $found) (eq (floor $found) $found) }}{{ $found = int64 $found }}{{ end -}}
{{- toString $found -}}
{{- end -}}
{{- end }}

{{- define "tcpio-otel.kubernetes" -}}
{{- if eq (include "tcpio-otel.key" (dict "config" .Values.config "key" "kubernetes.enabled")) "true" }}true{{ end -}}
{{- end }}

{{/* The port where metrics are scraped; empty where nobody else can reach it. */}}
{{- define "tcpio-otel.scrapePort" -}}
{{- $listen := include "tcpio-otel.key" (dict "config" .Values.config "key" "metrics.listen") -}}
{{- if not (regexMatch "^(127[.]|\\[::1\\])" $listen) }}{{ regexFind "[1-9][0-9]*$" $listen }}{{ end -}}
{{- end }}

{{/* What is watched of the cluster to name peers, with commas between. */}}
{{- define "tcpio-otel.peers" -}}
{{- join "," .Values.config.kubernetes.peers -}}
{{- end }}

{{/* Of that and the node's own pods, what is of the core API group, as a list in YAML. */}}
{{- define "tcpio-otel.coreResources" -}}
{{- $found := list "pods" -}}
{{- range include "tcpio-otel.peers" . | splitList "," -}}
{{- if has . (list "nodes" "services") }}{{ $found = append $found . }}{{ end -}}
{{- end -}}
{{- printf "[%s]" (sortAlpha $found | uniq | join ", ") -}}
{{- end }}

{{/* Whether the node's own translations of addresses are listened to. */}}
{{- define "tcpio-otel.backends" -}}
{{- if and (include "tcpio-otel.kubernetes" .) (eq (include "tcpio-otel.key" (dict "config" .Values.config "key" "kubernetes.backends")) "true") }}true{{ end -}}
{{- end }}

{{/* All endpoints that the chart knows of, one a line. */}}
{{- define "tcpio-otel.endpoints" -}}
{{- $found := list .Values.otlp.endpoint -}}
{{- range list "export.endpoint" "export.logs.endpoint" "export.traces.endpoint" "export.metrics.endpoint" -}}
{{- $found = append $found (include "tcpio-otel.key" (dict "config" $.Values.config "key" .)) -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if regexMatch "^(TCPIO_EXPORT|OTEL_EXPORTER_OTLP)_((LOGS|TRACES|METRICS)_)?ENDPOINT$" .name -}}
{{- $found = append $found (.value | default .name) -}}
{{- end -}}
{{- end -}}
{{- compact $found | join "\n" -}}
{{- end }}

{{/* The ports of all endpoints, one a line, as the agent takes them where they are not written. */}}
{{- define "tcpio-otel.ports" -}}
{{- $protocol := .Values.otlp.protocol | default (include "tcpio-otel.key" (dict "config" .Values.config "key" "export.protocol")) -}}
{{- $receivers := list (dict "endpoint" .Values.otlp.endpoint "protocol" $protocol) -}}
{{- range list "export" "export.logs" "export.traces" "export.metrics" -}}
{{- $endpoint := include "tcpio-otel.key" (dict "config" $.Values.config "key" (printf "%s.endpoint" .)) -}}
{{- $own := include "tcpio-otel.key" (dict "config" $.Values.config "key" (printf "%s.protocol" .)) -}}
{{- $receivers = append $receivers (dict "endpoint" $endpoint "protocol" ($own | default $protocol)) -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if regexMatch "^(TCPIO_EXPORT|OTEL_EXPORTER_OTLP)_((LOGS|TRACES|METRICS)_)?ENDPOINT$" .name -}}
{{- fail (printf "networkPolicy: what extraEnv %s names is not looked into: use otlp.endpoint, or networkPolicy.enabled=false" .name) -}}
{{- end -}}
{{- end -}}
{{- range $receivers -}}
{{- if .endpoint -}}
{{- include "tcpio-otel.port" . -}}
{{- "\n" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The port of a URL, as the agent takes it where it is not written: dict "endpoint" URL "protocol" PROTOCOL. */}}
{{- define "tcpio-otel.port" -}}
{{- $written := "^https?://[^/]*:([0-9]+)(/.*)?$" -}}
{{- if regexMatch $written .endpoint -}}
{{- regexReplaceAll $written .endpoint "${1}" -}}
{{- else if eq .protocol "grpc" -}}
4317
{{- else -}}
{{- hasPrefix "https:" .endpoint | ternary "443" "80" -}}
{{- end -}}
{{- end }}

{{/* Where OTLP/JSON files go; empty where there is an endpoint. */}}
{{- define "tcpio-otel.filesDirectory" -}}
{{- $given := include "tcpio-otel.key" (dict "config" .Values.config "key" "file.directory") -}}
{{- if $given }}{{ $given }}{{ else if not (include "tcpio-otel.endpoints" .) }}/var/lib/tcpio-otel{{ end -}}
{{- end }}

{{/* The file of pods, where there is one. */}}
{{- define "tcpio-otel.cacheFile" -}}
{{- if include "tcpio-otel.kubernetes" . -}}
{{- include "tcpio-otel.key" (dict "config" .Values.config "key" "kubernetes.cache") -}}
{{- end -}}
{{- end }}

{{/* The host's /sys/fs/bpf is mounted where contexts are read from a map in it; unset means true to the agent. */}}
{{- define "tcpio-otel.bpffs" -}}
{{- if ne (include "tcpio-otel.key" (dict "config" .Values.config "key" "correlation.published_contexts")) "false" }}true{{ end -}}
{{- end }}

{{/* The agent's configuration file. Attributes of the resource go by environment, as the node's name is one of them. */}}
{{- define "tcpio-otel.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if kindIs "map" $config.resource -}}
{{- $_ := unset $config.resource "attributes" -}}
{{- end -}}
{{- with include "tcpio-otel.filesDirectory" . -}}
{{- $_ := set $config "file" (merge (dict "directory" .) ($config.file | default dict)) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}

{{- define "tcpio-otel.resourceAttributes" -}}
{{- $node := "$(TCPIO_KUBERNETES_NODE_NAME)" -}}
{{- $pairs := list (printf "host.name=%s" $node) (printf "k8s.node.name=%s" $node) -}}
{{- if kindIs "map" .Values.config.resource -}}
{{- range $name, $value := .Values.config.resource.attributes -}}
{{- $pairs = append $pairs (printf "%s=%s" ($name | urlquery | replace "+" "%20") (toString $value | urlquery | replace "+" "%20")) -}}
{{- end -}}
{{- end -}}
{{- join "," $pairs -}}
{{- end }}

{{/* A duration of the configuration in milliseconds. */}}
{{- define "tcpio-otel.milliseconds" -}}
{{- if not (regexMatch "^[0-9]+([.][0-9]+)?\\s*(ms|s|m|h)?$" .) -}}
{{- fail (printf "%s is not a duration such as 250ms, 5s or 2m" .) -}}
{{- end -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[a-z]+$" . | default "s")) | ceil | int64 -}}
{{- end }}

{{/* A size of the configuration, or a quantity of Kubernetes, in bytes. */}}
{{- define "tcpio-otel.bytes" -}}
{{- if not (regexMatch "^[0-9]+([.][0-9]+)?\\s*(B|[kKMG]B|[KMG]iB|[kMGT]|[KMGT]i)?$" .) -}}
{{- fail (printf "%s is not a size such as 64MiB or 512Mi" .) -}}
{{- end -}}
{{- $unit := regexFind "[a-zA-Z]+$" . | trimSuffix "B" -}}
{{- $units := dict "k" 1000 "K" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 -}}
{{- $binary := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get (merge (dict "" 1) $units $binary) $unit) | int64 -}}
{{- end }}
