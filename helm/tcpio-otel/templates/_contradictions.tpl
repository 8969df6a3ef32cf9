{{/* What no single value can tell, and the schema cannot say: fails with what is wrong and what to do. */}}
{{- define "tcpio-otel.contradictions" -}}
{{- $key := dict -}}
{{- range list "source" "duration" "attribution.workloads" "capture.cgroup" "capture.queue_memory" "capture.ring_memory" "kubernetes.node_name" "kubernetes.kubelet" "kubernetes.kubelet_certificate" "export.endpoint" "export.protocol" "export.headers" "export.certificate" "export.client_certificate" "export.client_key" "export.queue_memory" "export.flush_timeout" "file.directory" -}}
{{- $_ := set $key . (include "tcpio-otel.key" (dict "config" $.Values.config "key" .)) -}}
{{- end -}}
{{- $endpoints := include "tcpio-otel.endpoints" . -}}
{{- with .Values -}}
{{- if and (get $key "source") (ne (get $key "source") "live") -}}
{{- fail "config.source: a DaemonSet records live; replay captures with `tcpio-otel run --source pcap:FILE` elsewhere" -}}
{{- end -}}
{{- if get $key "duration" -}}
{{- fail "config.duration: a DaemonSet restarts what ends; leave it unset" -}}
{{- end -}}
{{- range list "kubernetes.enabled" "kubernetes.backends" "attribution.workloads" "correlation.published_contexts" -}}
{{- $value := include "tcpio-otel.key" (dict "config" $.Values.config "key" .) -}}
{{- if not (has $value (list "" "true" "false")) -}}
{{- fail (printf "config.%s: %s is not true or false" . $value) -}}
{{- end -}}
{{- end -}}
{{- if not (regexMatch "^/host/sys/fs/cgroup(/|$)" (get $key "capture.cgroup")) -}}
{{- fail "config.capture.cgroup must be /host/sys/fs/cgroup or below it: elsewhere a pod sees its own cgroup only" -}}
{{- end -}}
{{- if include "tcpio-otel.kubernetes" $ -}}
{{- if eq (get $key "attribution.workloads") "false" -}}
{{- fail "config.kubernetes.enabled says of workloads which pods they are: it needs config.attribution.workloads" -}}
{{- end -}}
{{- if get $key "kubernetes.node_name" -}}
{{- fail "config.kubernetes.node_name is every node's own, and set by the downward API: leave it unset" -}}
{{- end -}}
{{- if and (include "tcpio-otel.backends" $) .networkPolicy.enabled -}}
{{- fail "config.kubernetes.backends puts the pods on the host's network, where no NetworkPolicy holds: choose one" -}}
{{- end -}}
{{- if and (include "tcpio-otel.backends" $) (not (include "tcpio-otel.peers" $)) -}}
{{- fail "config.kubernetes.backends says who is behind addresses: it needs config.kubernetes.peers, such as [services]" -}}
{{- end -}}
{{- if and .rbac.create (not .serviceAccount.create) (not .serviceAccount.name) -}}
{{- fail "serviceAccount.create is false: give serviceAccount.name, or every pod of the namespace could list pods" -}}
{{- end -}}
{{- end -}}
{{- if or (get $key "kubernetes.kubelet") (get $key "kubernetes.kubelet_certificate") -}}
{{- fail "config.kubernetes.kubelet takes a right, and each node has its own: use kubelet.url and kubelet.certificateHostPath" -}}
{{- end -}}
{{- if and .kubelet.url (not (include "tcpio-otel.kubernetes" $)) -}}
{{- fail "kubelet.url stands in for the API server: it needs config.kubernetes.enabled" -}}
{{- end -}}
{{- if and .kubelet.certificateHostPath (not .kubelet.url) -}}
{{- fail "kubelet.certificateHostPath is for kubelet.url, which is not set" -}}
{{- end -}}
{{- if and .podMonitor.enabled (not (include "tcpio-otel.scrapePort" $)) -}}
{{- fail "podMonitor.enabled: there is nothing to scrape; set config.metrics.listen to an address that others reach and a port, such as 0.0.0.0:9464" -}}
{{- end -}}
{{- range list "endpoint" "protocol" -}}
{{- if and (get $.Values.otlp .) (get $key (printf "export.%s" .)) -}}
{{- fail (printf "otlp.%s and config.export.%s are both set: choose one" . .) -}}
{{- end -}}
{{- end -}}
{{- if and .otlp.headers.secretName (get $key "export.headers") -}}
{{- fail "otlp.headers.secretName and config.export.headers are both set, and the former would replace the latter: choose one" -}}
{{- end -}}
{{- if and .otlp.tls.caSecretName (get $key "export.certificate") -}}
{{- fail "otlp.tls.caSecretName and config.export.certificate are both set: choose one" -}}
{{- end -}}
{{- if and .otlp.tls.clientSecretName (or (get $key "export.client_certificate") (get $key "export.client_key")) -}}
{{- fail "otlp.tls.clientSecretName and config.export.client_certificate or client_key are both set: choose one" -}}
{{- end -}}
{{- if and (not $endpoints) (or .otlp.protocol .otlp.headers.secretName .otlp.tls.caSecretName .otlp.tls.clientSecretName) -}}
{{- fail "otlp.protocol, otlp.headers and otlp.tls are for a receiver: set otlp.endpoint" -}}
{{- end -}}
{{- if and (hasPrefix "http://" .otlp.endpoint) (or .otlp.tls.caSecretName .otlp.tls.clientSecretName) -}}
{{- fail "otlp.endpoint begins with http://, which sends in the clear: otlp.tls needs https://" -}}
{{- end -}}
{{- if and $endpoints (get $key "file.directory") -}}
{{- fail "config.file.directory and an OTLP endpoint are both set: the ledger counts a packet once; choose one" -}}
{{- end -}}
{{- if and .storage.filesHostPath $endpoints -}}
{{- fail "storage.filesHostPath is for OTLP/JSON files, and an OTLP endpoint is set: choose one" -}}
{{- end -}}
{{- if and .storage.cacheHostPath (not (include "tcpio-otel.cacheFile" $)) -}}
{{- fail "storage.cacheHostPath needs config.kubernetes.enabled and config.kubernetes.cache" -}}
{{- end -}}
{{- if and (eq .seccompProfile.type "Localhost") (not .seccompProfile.localhostProfile) -}}
{{- fail "seccompProfile.type is Localhost: give seccompProfile.localhostProfile" -}}
{{- end -}}
{{- if and (ne .seccompProfile.type "Localhost") .seccompProfile.localhostProfile -}}
{{- fail "seccompProfile.localhostProfile is set: seccompProfile.type must be Localhost" -}}
{{- end -}}
{{- if not (has "NET_ADMIN" .capabilities) -}}
{{- fail "capabilities lacks NET_ADMIN: the probe cannot be attached" -}}
{{- end -}}
{{- if not (or (has "SYS_ADMIN" .capabilities) (and (has "BPF" .capabilities) (has "PERFMON" .capabilities))) -}}
{{- fail "capabilities needs BPF and PERFMON, or SYS_ADMIN in their place: the probe cannot be loaded" -}}
{{- end -}}
{{- $flush := include "tcpio-otel.milliseconds" (get $key "export.flush_timeout" | default "5s") | int64 -}}
{{- if le (mul 1000 .terminationGracePeriodSeconds) $flush -}}
{{- fail (printf "terminationGracePeriodSeconds (%v) must be longer than config.export.flush_timeout (%s): what is queued would be lost" .terminationGracePeriodSeconds (get $key "export.flush_timeout")) -}}
{{- end -}}
{{- $limit := include "tcpio-otel.key" (dict "config" .resources "key" "limits.memory") -}}
{{- if $limit -}}
{{- $queues := include "tcpio-otel.bytes" (get $key "capture.queue_memory" | default "256MiB") | int64 -}}
{{- $queues = add $queues (include "tcpio-otel.bytes" (get $key "capture.ring_memory" | default "16MiB") | int64) -}}
{{- $queues = add $queues (mul 3 (include "tcpio-otel.bytes" (get $key "export.queue_memory" | default "64MiB") | int64)) -}}
{{- $request := include "tcpio-otel.key" (dict "config" .resources "key" "requests.memory") -}}
{{- $itself := include "tcpio-otel.bytes" ($request | default "0") | int64 -}}
{{- if lt (include "tcpio-otel.bytes" $limit | int64) (add $queues $itself | int64) -}}
{{- fail (printf "resources.limits.memory (%s) must hold resources.requests.memory and full queues (%d bytes together): raise it, or lower config.capture.queue_memory or ring_memory, or config.export.queue_memory, of which there are three" $limit (add $queues $itself)) -}}
{{- end -}}
{{- end -}}
{{- range list "commonLabels" "podLabels" "podAnnotations" -}}
{{- $value := . -}}
{{- range $name, $_ := get $.Values . -}}
{{- if regexMatch "^(app[.]kubernetes[.]io/(name|instance|component|version|managed-by)|helm[.]sh/chart|checksum/config)$" $name -}}
{{- fail (printf "%s: %s is set by the chart" $value $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $own := list "TCPIO_KUBERNETES_NODE_NAME" "HOST_IP" -}}
{{- range .extraEnv -}}
{{- if has .name $own -}}
{{- fail (printf "extraEnv: %s is set by the chart" .name) -}}
{{- end -}}
{{- if has .name (list "TCPIO_KUBERNETES_ENABLED" "TCPIO_KUBERNETES_PEERS" "TCPIO_KUBERNETES_BACKENDS" "TCPIO_KUBERNETES_KUBELET" "TCPIO_KUBERNETES_KUBELET_CERTIFICATE") -}}
{{- fail (printf "extraEnv: rights and volumes follow from config.kubernetes and kubelet, not from %s" .name) -}}
{{- end -}}
{{- if eq .name "TCPIO_METRICS_LISTEN" -}}
{{- fail "extraEnv: ports follow from config.metrics.listen, not from TCPIO_METRICS_LISTEN" -}}
{{- end -}}
{{- if has .name (list "TCPIO_RESOURCE_ATTRIBUTES" "OTEL_RESOURCE_ATTRIBUTES") -}}
{{- fail (printf "extraEnv: %s would do away with host.name: use config.resource.attributes" .name) -}}
{{- end -}}
{{- $given := dict "TCPIO_EXPORT_ENDPOINT" $.Values.otlp.endpoint "TCPIO_EXPORT_PROTOCOL" $.Values.otlp.protocol "TCPIO_EXPORT_HEADERS" $.Values.otlp.headers.secretName "TCPIO_EXPORT_CERTIFICATE" $.Values.otlp.tls.caSecretName "TCPIO_EXPORT_CLIENT_CERTIFICATE" $.Values.otlp.tls.clientSecretName "TCPIO_EXPORT_CLIENT_KEY" $.Values.otlp.tls.clientSecretName -}}
{{- if get $given .name -}}
{{- fail (printf "extraEnv: %s is set by otlp.* already: choose one" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
