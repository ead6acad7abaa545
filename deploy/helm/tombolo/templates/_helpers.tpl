{{/* Labels that select a component's pods; they never change. Called with (dict "component" NAME "root" $). */}}
{{- define "tombolo.selector" -}}
app.kubernetes.io/name: tombolo
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "tombolo.labels" -}}
{{ include "tombolo.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "tombolo.image" -}}
{{- .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{- define "tombolo.trustDomain" -}}
{{ .Values.trustDomain | default (printf "%s.tombolo" .Values.cluster) }}
{{- end }}

{{/* Listens on this port at every address of the pod. Called with (dict "port" PORT "root" $). */}}
{{- define "tombolo.everywhere" -}}
{{ eq .root.Values.ipFamily "IPv6" | ternary "[::]" "0.0.0.0" }}:{{ .port }}
{{- end }}

{{/* The pod's own address with this port; Kubernetes puts the address in. */}}
{{- define "tombolo.ownAddress" -}}
{{ eq .root.Values.ipFamily "IPv6" | ternary "[$(POD_IP)]" "$(POD_IP)" }}:{{ .port }}
{{- end }}

{{/* Fields of every role's configuration. */}}
{{- define "tombolo.common" -}}
log: {level: {{ .Values.log.level | quote }}, format: {{ .Values.log.format }}}
{{- with .Values.telemetry.otlp }}
telemetry: {otlp: {{ . | quote }}, sampleRatio: {{ $.Values.telemetry.sampleRatio }}}
{{- end }}
{{- end }}

{{/* What both kinds of pods have. Called with (dict "component" NAME "values" VALUES "root" $). */}}
{{- define "tombolo.pod" -}}
serviceAccountName: {{ .component }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add .values.drainSeconds 10 }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- range $key, $unsatisfiable := dict "kubernetes.io/hostname" .root.Values.spread "topology.kubernetes.io/zone" "ScheduleAnyway" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: {{ $unsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "tombolo.selector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
  {{- if and (eq .component "gateway") (lt (int .values.tunnelPort) 1024) }}
  # One of the few that restricted pods may set: ports below 1024 without a capability.
  sysctls:
    - {name: net.ipv4.ip_unprivileged_port_start, value: "0"}
  {{- end }}
{{- end }}

{{/* What both kinds of containers have. Called with (dict "adminPort" PORT "values" VALUES "root" $). */}}
{{- define "tombolo.container" -}}
image: {{ include "tombolo.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  # For the operator's commands, by kubectl exec.
  - name: TOMBOLO_STATE
    value: {{ include "tombolo.state" . }}
livenessProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 2
  failureThreshold: 2
resources:
  {{- toYaml .values.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Below the volume, so that the program makes it itself, for its own user alone. */}}
{{- define "tombolo.state" -}}
/var/lib/tombolo/state
{{- end }}
