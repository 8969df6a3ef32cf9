{{/* The pod of the DaemonSet and of `helm test`: dict "root" $ "arguments" LIST "restartPolicy" NAME. */}}
{{- define "tcpio-otel.pod" -}}
{{- $root := .root -}}
{{- with .root.Values -}}
{{- $kubernetes := include "tcpio-otel.kubernetes" $root -}}
{{- $cache := include "tcpio-otel.cacheFile" $root -}}
{{- $files := include "tcpio-otel.filesDirectory" $root -}}
{{- $bpffs := include "tcpio-otel.bpffs" $root -}}
{{- $tls := or .otlp.tls.caSecretName .otlp.tls.clientSecretName -}}
serviceAccountName: {{ include "tcpio-otel.serviceAccountName" $root }}
automountServiceAccountToken: {{ eq $kubernetes "true" }}
{{- if include "tcpio-otel.backends" $root }}
# Connections are translated in the node's own network.
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
# The agent tells whose a connection is by process ids of the host.
hostPID: true
# A Service called tcpio-* would put TCPIO_* variables here, and the agent refuses those that it does not know.
enableServiceLinks: false
restartPolicy: {{ $.restartPolicy }}
terminationGracePeriodSeconds: {{ .terminationGracePeriodSeconds }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: tcpio-otel
    image: {{ include "tcpio-otel.image" $root | quote }}
    imagePullPolicy: {{ .image.pullPolicy }}
    command: [tcpio-otel]
    args:
      {{- toYaml $.arguments | nindent 6 }}
    env:
      - name: TCPIO_KUBERNETES_NODE_NAME
        valueFrom:
          fieldRef:
            fieldPath: spec.nodeName
      - name: HOST_IP
        valueFrom:
          fieldRef:
            fieldPath: status.hostIP
      # Inside, host.name would be the pod's.
      - name: TCPIO_RESOURCE_ATTRIBUTES
        value: {{ include "tcpio-otel.resourceAttributes" $root | quote }}
      {{- with .extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- with .kubelet.url }}
      - name: TCPIO_KUBERNETES_KUBELET
        value: {{ . | quote }}
      {{- end }}
      {{- if .kubelet.certificateHostPath }}
      - name: TCPIO_KUBERNETES_KUBELET_CERTIFICATE
        value: /host/kubelet-ca.pem
      {{- end }}
      {{- with .otlp.endpoint }}
      - name: TCPIO_EXPORT_ENDPOINT
        value: {{ . | quote }}
      {{- end }}
      {{- with .otlp.protocol }}
      - name: TCPIO_EXPORT_PROTOCOL
        value: {{ . | quote }}
      {{- end }}
      {{- with .otlp.headers }}
      {{- if .secretName }}
      - name: TCPIO_EXPORT_HEADERS
        valueFrom:
          secretKeyRef:
            name: {{ .secretName }}
            key: {{ .secretKey }}
      {{- end }}
      {{- end }}
      {{- if .otlp.tls.caSecretName }}
      - name: TCPIO_EXPORT_CERTIFICATE
        value: /etc/tcpio-otel-tls/ca.crt
      {{- end }}
      {{- if .otlp.tls.clientSecretName }}
      - name: TCPIO_EXPORT_CLIENT_CERTIFICATE
        value: /etc/tcpio-otel-tls/tls.crt
      - name: TCPIO_EXPORT_CLIENT_KEY
        value: /etc/tcpio-otel-tls/tls.key
      {{- end }}
    {{- /* `helm test` asks for no port: on the host's network the agent has it. */}}
    {{- if eq $.restartPolicy "Always" }}
    {{- with include "tcpio-otel.scrapePort" $root }}
    ports:
      - name: metrics
        containerPort: {{ . }}
        protocol: TCP
    {{- end }}
    {{- end }}
    securityContext:
      # Kubernetes gives capabilities to user 0 only.
      runAsUser: 0
      privileged: false
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
        add:
          {{- toYaml .capabilities | nindent 10 }}
      seccompProfile:
        {{- with .seccompProfile }}
        type: {{ .type }}
        {{- with .localhostProfile }}
        localhostProfile: {{ . }}
        {{- end }}
        {{- end }}
      {{- with .seLinuxOptions }}
      seLinuxOptions:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    resources:
      {{- toYaml .resources | nindent 6 }}
    volumeMounts:
      - name: config
        mountPath: /etc/tcpio-otel
        readOnly: true
      - name: host-cgroup
        mountPath: /host/sys/fs/cgroup
        readOnly: true
      {{- if .host.machineId }}
      - name: host-machine-id
        mountPath: /etc/machine-id
        readOnly: true
      {{- end }}
      {{- if .kubelet.certificateHostPath }}
      - name: host-kubelet-ca
        mountPath: /host/kubelet-ca.pem
        readOnly: true
      {{- end }}
      {{- if $bpffs }}
      - name: host-bpf
        mountPath: /sys/fs/bpf
        readOnly: true
      {{- end }}
      {{- if $cache }}
      - name: cache
        mountPath: {{ dir $cache }}
      {{- end }}
      {{- if $files }}
      - name: files
        mountPath: {{ $files }}
      {{- end }}
      {{- if $tls }}
      - name: tls
        mountPath: /etc/tcpio-otel-tls
        readOnly: true
      {{- end }}
      {{- with .extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "tcpio-otel.fullname" $root }}
  # The host's own tree: a fresh mount would have the pod's cgroup for its root.
  - name: host-cgroup
    hostPath:
      path: {{ .host.cgroup }}
      type: Directory
  {{- with .host.machineId }}
  - name: host-machine-id
    hostPath:
      path: {{ . }}
      type: File
  {{- end }}
  {{- with .kubelet.certificateHostPath }}
  - name: host-kubelet-ca
    hostPath:
      path: {{ . }}
      type: File
  {{- end }}
  {{- if $bpffs }}
  - name: host-bpf
    hostPath:
      path: /sys/fs/bpf
      type: Directory
  {{- end }}
  {{- if $cache }}
  - name: cache
    {{- include "tcpio-otel.directory" .storage.cacheHostPath | nindent 4 }}
  {{- end }}
  {{- if $files }}
  - name: files
    {{- include "tcpio-otel.directory" .storage.filesHostPath | nindent 4 }}
  {{- end }}
  {{- if $tls }}
  - name: tls
    projected:
      defaultMode: 0400
      sources:
        {{- with .otlp.tls }}
        {{- if .caSecretName }}
        - secret:
            name: {{ .caSecretName }}
            items:
              - key: {{ .caKey }}
                path: ca.crt
        {{- end }}
        {{- if .clientSecretName }}
        - secret:
            name: {{ .clientSecretName }}
            items:
              - key: {{ .certificateKey }}
                path: tls.crt
              - key: {{ .privateKeyKey }}
                path: tls.key
        {{- end }}
        {{- end }}
  {{- end }}
  {{- with .extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
{{- end }}

{{- define "tcpio-otel.directory" -}}
{{- if . -}}
hostPath:
  path: {{ . }}
  type: DirectoryOrCreate
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end }}
